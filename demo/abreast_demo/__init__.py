"""A small shop in two versions, to see Abreast at work: `abreast demo`."""
