# One image for every process of the fleet: workers, sweep, migrations and Flower.

FROM python:3.12-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/sluicegate
ENV PATH=/opt/sluicegate/bin:$PATH
WORKDIR /src
# Packages change less often than our code: a layer of their own.
COPY requirements.lock ./
RUN pip install --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY alembic alembic
COPY shared shared
COPY workers workers
COPY producers producers
COPY sluicegate sluicegate
# The build backend is among the locked packages, so nothing unlocked is fetched.
RUN pip install --no-deps --no-build-isolation .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --create-home --shell /usr/sbin/nologin sluice
COPY --from=build /opt/sluicegate /opt/sluicegate
ENV PATH=/opt/sluicegate/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/sluice
USER sluice
# A worker drains on SIGTERM: give it more than SLUICE_GRACE_S before SIGKILL.
STOPSIGNAL SIGTERM
CMD ["sluice", "--help"]
