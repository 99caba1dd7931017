"""The collector of the captures that Envoy makes: it redacts them and sends them to Redis, as the middleware does."""
