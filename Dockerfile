# The environment of `make setup`, from the locks, with torch's build for CPUs.
#
#     docker build -t textguard .
#     docker run --rm -it textguard                     # the demo
#     docker run --rm -it textguard make smoke          # the smallest grid
#     docker run --rm -it -v "$PWD/out:/home/user/out" textguard bash -c 'make repro && cp -r metrics plots ~/out'
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user

USER user
WORKDIR /home/user/textguard
# With .git, because DVC and the page ask it which revision this is.
COPY --chown=user . .
RUN make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

CMD ["make", "repro"]
