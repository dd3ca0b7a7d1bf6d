"""What the server tells of itself in Prometheus' text form.

Owns the figures of requests and how all figures are written. Does not know what is served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

# Upper bounds in seconds of the first-token histogram.
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Requests by route and status, and how long the first token took."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._first_tokens: Counter[float] = Counter()
        self._num_first_tokens, self._first_token_seconds = 0, 0.0

    def count_request(self, route: str, status: int) -> None:
        """One request is over; status 0: the client left before an answer began."""
        self._requests[route, status] += 1

    def observe_first_token(self, seconds: float) -> None:
        """A request's first token came so long after the request."""
        self._num_first_tokens += 1
        self._first_token_seconds += seconds
        self._first_tokens.update(bound for bound in _BOUNDS if seconds <= bound)

    def text(self, models: Mapping[str, Mapping[str, float]]) -> str:
        """All figures, `models` those of the backends. Source: Prometheus' text exposition format 0.0.4."""
        lines = ["# TYPE graftlm_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            lines.append(f'graftlm_requests_total{{route="{route}",status="{status}"}} {count}')
        lines.append("# TYPE graftlm_first_token_seconds histogram")
        for bound in _BOUNDS:
            lines.append(f'graftlm_first_token_seconds_bucket{{le="{bound}"}} {self._first_tokens[bound]}')
        lines.append(f'graftlm_first_token_seconds_bucket{{le="+Inf"}} {self._num_first_tokens}')
        lines.append(f"graftlm_first_token_seconds_sum {self._first_token_seconds:.6f}")
        lines.append(f"graftlm_first_token_seconds_count {self._num_first_tokens}")
        names = sorted({name for figures in models.values() for name in figures})
        for name in names:
            lines.append(f"# TYPE graftlm_{name} {'counter' if name.endswith('_total') else 'gauge'}")
            for model, figures in models.items():
                if name in figures:
                    lines.append(f'graftlm_{name}{{model="{_escaped(model)}"}} {figures[name]:g}')
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
