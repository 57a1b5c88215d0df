# The course and its engine in a container, made by the README's own commands.
#
#   docker build -t course .
#   docker run --rm -p 8000:8000 course                         the server: make serve
#   docker run --rm -it -v "$PWD/stages:/course/stages" course make test-stage-1
#
# A CPU build of PyTorch makes the image several GB smaller: --build-arg PIP_ARGS="--extra-index-url ADDRESS", with the address
# that PyTorch's own installation page shows for "CPU".
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /course
COPY . .
ARG PIP_ARGS=""
RUN make setup PIP_ARGS="$PIP_ARGS"

EXPOSE 8000
CMD ["make", "serve", "HOST=0.0.0.0"]
