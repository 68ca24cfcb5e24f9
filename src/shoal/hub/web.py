"""A hub's HTTP face: reading what it holds. Writing goes over links, where the writer has proved who it is.

`GET /v1/offers`, `GET /v1/offers/{node_id}`, `GET /v1/hub`, `GET /healthz`; the OpenAPI document is at
`/schema/openapi.json`, a page for people at `/schema`. Node ids are hexadecimal; `envelope` is the signed record in
base64, so that a reader need not believe the hub.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from html import escape
from typing import Annotated, Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.params import Parameter

from shoal.errors import BadInput, LinkError, ShoalError
from shoal.hub.index import KeptOffer, OfferIndex
from shoal.hub.rates import FINDS_PER_SOURCE, HubBusy
from shoal.identity import node_id_from_hex, short_id
from shoal.protocol.hubs import HubInfo
from shoal.protocol.offers import FOUND_MAX, Capability, EngineOffer, OfferFind
from shoal.transport.allowances import AtOnce, RateLimit, TooManyRequests
from shoal.world import Clock, source_of

READ_PER_S, READ_BURST = 20.0, 200
"""What one client's address may ask for."""


class BadQuery(BadInput):
    """A query on the HTTP face has an unknown name or a value that cannot be."""

    code = "SH-113"


class NoSuchOffer(LinkError):
    """The hub holds no live offer of the node asked for."""

    code = "SH-336"


class OfferView(msgspec.Struct, frozen=True):
    """One live offer, read for people and programs, with the signed record it was read from."""

    node_id: str
    name: str
    sequence: int
    issued_ms: int
    """Unix milliseconds on the node's clock, which may be wrong."""
    lifetime_ms: int
    arrived_ms: int
    expires_ms: int
    """Both Unix milliseconds on the hub's clock."""
    addresses: tuple[str, ...]
    accepts: tuple[str, ...]
    busy: bool
    engine: EngineOffer | None
    capability: Capability
    envelope: bytes
    """The signed record as the node made it: msgpack, here in base64."""


class OffersPage(msgspec.Struct, frozen=True):
    offers: list[OfferView]
    more: bool
    next: str | None
    """`after` for the next page, when there is more."""


class HubView(msgspec.Struct, frozen=True):
    node_id: str
    name: str
    network: str
    software: str
    protocol_oldest: int
    protocol_newest: int
    addresses: tuple[str, ...]
    offers: int
    offers_max: int
    links: int


class Health(msgspec.Struct, frozen=True):
    status: str
    offers: int


class Trouble(msgspec.Struct, frozen=True):
    """What every answer that is not 200 says."""

    code: str
    sentence: str


def _view(kept: KeptOffer) -> OfferView:
    offer = kept.offer
    return OfferView(
        node_id=kept.node.hex(),
        name=offer.name,
        sequence=offer.sequence,
        issued_ms=offer.issued_ms,
        lifetime_ms=offer.lifetime_ms,
        arrived_ms=kept.arrived_ms,
        expires_ms=kept.expires_ms,
        addresses=offer.addresses,
        accepts=offer.accepts,
        busy=offer.busy,
        engine=offer.engine,
        capability=offer.capability,
        envelope=kept.envelope,
    )


def _wanted(query: dict[str, Any]) -> OfferFind:
    """Query -> OfferFind under the very limits the protocol has. Raises BadQuery."""
    given = {name: value for name, value in query.items() if value is not None}
    for name in ("node", "after"):
        if name in given:
            given[name] = node_id_from_hex(given[name])
    try:
        return msgspec.convert(given, OfferFind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise BadQuery(f"This search cannot be: {error}.") from error


def make_app(index: OfferIndex, info: Callable[[], Awaitable[HubInfo]], clock: Clock) -> Litestar:
    """The ASGI application over an index and what the hub says about itself."""
    reading = RateLimit(clock, READ_PER_S, READ_BURST)
    searches = AtOnce(FINDS_PER_SOURCE, HubBusy)

    def source(request: Request[Any, Any, Any]) -> str:
        return source_of(request.client.host) if request.client else "?"

    async def meter(request: Request[Any, Any, Any]) -> None:
        reading.spend(source(request).encode(), "Requests")

    @get("/v1/offers", summary="Live offers that fit", tags=["offers"])
    async def offers(
        request: Request[Any, Any, Any],
        accepts: Annotated[str | None, Parameter(description="Takes jobs of this kind, for example train.")] = None,
        device: Annotated[str | None, Parameter(description="Has a cuda, rocm, mps, xpu or cpu device.")] = None,
        model: Annotated[str | None, Parameter(description="Has an engine that serves this model.")] = None,
        name: Annotated[str | None, Parameter(description="Has exactly this name.")] = None,
        node: Annotated[str | None, Parameter(description="Is this node: 64 hexadecimal digits.")] = None,
        memory_bytes_min: Annotated[int, Parameter(description="Memory on one device, bytes.")] = 0,
        flops_min: Annotated[float, Parameter(description="FLOP/s of one device's best dtype, measured.")] = 0.0,
        idle_only: Annotated[bool, Parameter(description="Leave out nodes that are busy.")] = False,
        limit: Annotated[int, Parameter(description=f"At most so many, 1 to {FOUND_MAX}.")] = 64,
        after: Annotated[str | None, Parameter(description="Go on after this node: `next` of the last page.")] = None,
    ) -> OffersPage:
        known = {
            "accepts", "device", "model", "name", "node", "memory_bytes_min", "flops_min", "idle_only", "limit",
            "after",
        }  # fmt: skip
        unknown = sorted(set(request.query_params) - known)
        if unknown:
            raise BadQuery(f"{unknown[0]!r} is no filter; there are {', '.join(sorted(known))}.")
        wanted = _wanted(
            {
                "accepts": accepts,
                "device": device,
                "model": model,
                "name": name,
                "node": node,
                "memory_bytes_min": memory_bytes_min,
                "flops_min": flops_min,
                "idle_only": idle_only,
                "limit": limit,
                "after": after,
            }
        )
        with searches.place(source(request), "searches"):
            found, more = await index.find(wanted)
        return OffersPage([_view(kept) for kept in found], more, found[-1].node.hex() if more and found else None)

    @get("/v1/offers/{node_id:str}", summary="The live offer of one node", tags=["offers"])
    async def offer(node_id: Annotated[str, Parameter(description="64 hexadecimal digits.")]) -> OfferView:
        node = node_id_from_hex(node_id)
        kept = await index.get(node)
        if kept is None:
            raise NoSuchOffer(
                f"This hub holds no live offer of node {short_id(node)}: it is stopped, or uses other hubs."
            )
        return _view(kept)

    @get("/v1/hub", summary="Who this hub is and how many it knows", tags=["hub"])
    async def hub() -> HubView:
        about = await info()
        return HubView(
            about.node.hex(),
            about.name,
            about.network,
            about.software,
            about.protocol_oldest,
            about.protocol_newest,
            about.addresses,
            about.offers,
            about.offers_max,
            about.links,
        )

    @get("/healthz", summary="Whether the hub can read its index", tags=["hub"])
    async def health() -> Health:
        return Health("ok", await index.count())

    return Litestar(
        [offers, offer, hub, health],
        before_request=meter,
        exception_handlers={ShoalError: _refusal, HTTPException: _http_error},
        openapi_config=OpenAPIConfig(
            title="Shoal hub",
            version="1",
            description="Reads what a hub holds. Offers are published over links; see docs/hub.md.",
            path="/schema",
            render_plugins=[PlainPage(path="/"), JsonRenderPlugin(path="/openapi.json")],
        ),
        logging_config=None,
        request_max_body_size=4096,
    )


def _refusal(_: Request[Any, Any, Any], error: ShoalError) -> Response[Trouble]:
    status = 503
    if isinstance(error, BadInput):
        status = 400
    elif isinstance(error, NoSuchOffer):
        status = 404
    elif isinstance(error, TooManyRequests | HubBusy):
        status = 429
    return Response(Trouble(error.code, error.sentence), status_code=status, media_type=MediaType.JSON)


def _http_error(_: Request[Any, Any, Any], error: HTTPException) -> Response[Trouble]:
    trouble = Trouble(BadQuery.code if error.status_code == 400 else "SH-000", f"{error.detail.rstrip('.')}.")
    return Response(trouble, status_code=error.status_code, media_type=MediaType.JSON)


class PlainPage(OpenAPIRenderPlugin):
    """The OpenAPI document as one HTML page that loads nothing else, so that it works on a machine without internet."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        parts = [_PAGE_HEAD, f"<h1>{escape(openapi_schema['info']['title'])}</h1>",
                 f"<p>{escape(openapi_schema['info'].get('description', ''))}</p>",
                 '<p>For programs: <a href="/schema/openapi.json">openapi.json</a></p>']  # fmt: skip
        for path, methods in openapi_schema["paths"].items():
            for method, operation in methods.items():
                parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
                parts.append(f"<p>{escape(operation.get('summary', ''))}</p>")
                if operation.get("parameters"):
                    parts.append("<table><tr><th>parameter<th>where<th>type<th>meaning</tr>")
                    parts += [_parameter_row(parameter) for parameter in operation["parameters"]]
                    parts.append("</table>")
        parts.append("</body></html>")
        return "\n".join(parts).encode()


def _parameter_row(parameter: dict[str, Any]) -> str:
    schema = parameter.get("schema", {})
    kinds = [schema.get("type", ""), *(one.get("type", "") for one in schema.get("oneOf", ()))]
    shown = " or ".join(kind for kind in kinds if kind and kind != "null")
    cells = (parameter["name"], parameter["in"], shown, parameter.get("description", ""))
    return "<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in cells) + "</tr>"


_PAGE_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Shoal hub</title>
<meta name="viewport" content="width=device-width"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top} h2{margin-top:2rem}
</style></head><body>"""
