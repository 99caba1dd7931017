"""Local servers for `abreast up`, the demo, the drills and the tests."""
