# The sidecar, the command line, and the demo's shop. Services of your own only need `pip install abreast`.
FROM python:3.13-slim-bookworm

WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
# The lock as constraints: its hashes would forbid installing from this folder.
RUN sed -E '/^ +--hash=/d; s/ *\\$//' requirements.lock > /tmp/constraints.txt
COPY middleware middleware
COPY sidecar sidecar
COPY demo demo
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt '.[sidecar]' fastapi \
    && rm -rf /src /tmp/constraints.txt

WORKDIR /
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
CMD ["abreast", "--help"]
