"""OpenTelemetry traces of requests, over both hops: an extra (`pip install '.[otel]'`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from services.protocol.errors import InvalidInput


@contextmanager
def tracing(app: FastAPI, endpoint: str | None) -> Iterator[None]:
    """Exports OpenTelemetry spans of the requests that the application gets and sends, while the context lasts.

    A span has method, route, status and times: no header, body or file name. `endpoint` takes OTLP over HTTP, such as
    http://host:4318/v1/traces; None: no traces. Raises InvalidInput if the extra is not installed.
    """
    if endpoint is None:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidInput(f"--otlp-endpoint needs the extra otel: pip install '.[otel]' ({error})") from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"zo-gateway-{app.title}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="/v2/health/")
    client = HTTPXClientInstrumentor()
    client.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        client.uninstrument()
        FastAPIInstrumentor.uninstrument_app(app)
        provider.shutdown()
