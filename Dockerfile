# Three images from one file: docker build --target hospital|gateway|trainer .
# They share the layer with PyTorch; none but the trainer's has what training needs.
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON} AS base
# PyTorch's CPU wheels, a seventh of the size; empty: PyPI's, with CUDA. A wheel of the same version from here is
# preferred because its version ends in +cpu.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_EXTRA_INDEX_URL=${TORCH_INDEX}
WORKDIR /app
# Dependencies before the source: a change of the code installs nothing anew.
COPY pyproject.toml README.md LICENSE ./
RUN pip install '.[dicom]' \
    && useradd --uid 10001 --no-create-home --home-dir /tmp app \
    && install --directory --owner app /artifacts
# Under a read-only root file system everything that is written goes to /artifacts or /tmp.
ENV HOME=/tmp


FROM base AS hospital
RUN pip install '.[segmentation]'
COPY services/*.py services/
COPY services/protocol services/protocol
COPY services/hospital services/hospital
USER app
ENV HOSPITAL_HOST=0.0.0.0 HOSPITAL_PORT=8000 HOSPITAL_MODEL=/artifacts/victim
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
CMD ["python", "-m", "services.hospital"]


FROM base AS gateway
RUN pip install '.[runtimes]'
COPY defense defense
COPY services/*.py services/
COPY services/protocol services/protocol
COPY services/gateway services/gateway
USER app
ENV GATEWAY_HOST=0.0.0.0 GATEWAY_PORT=8080 GATEWAY_ARTIFACT=/artifacts/pretrained/denoiser
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=4)"]
CMD ["python", "-m", "services.gateway"]


FROM base AS trainer
RUN pip install '.[training]'
COPY defense defense
COPY services services
COPY training training
COPY zo_gateway zo_gateway
# So that the installed command finds them.
ENV PYTHONPATH=/app
USER app
CMD ["python", "-m", "training.zo_fit", "--help"]
