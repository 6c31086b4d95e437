"""What licences are called, where their texts are, and what to warn of: names of SPDX and of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Identifiers of SPDX; a card may write them in any case. The hub takes these too,
_SPDX_AND_HUB = """
AFL-3.0 AGPL-3.0 Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear BSL-1.0 CC-BY-2.0 CC-BY-2.5
CC-BY-3.0 CC-BY-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-2.0
CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CC-BY-ND-4.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0
CDLA-Sharing-1.0 ECL-2.0 EPL-1.0 EPL-2.0 etalab-2.0 EUPL-1.1 EUPL-1.2 GPL-2.0 GPL-3.0 ISC LGPL-2.1 LGPL-3.0 LPPL-1.3c
MIT MPL-2.0 MS-PL NCSA OFL-1.1 OSL-3.0 PostgreSQL Unlicense WTFPL Zlib
"""
# and wants these as `license: other` with the name beside it, in `license_name`.
_SPDX_ALONE = """
0BSD AGPL-3.0-only AGPL-3.0-or-later C-UDA-1.0 CC-BY-ND-3.0 CC-BY-SA-2.0 CC-BY-SA-2.5 CC-PDDC DL-DE-BY-2.0
DL-DE-ZERO-2.0 GFDL-1.1 GFDL-1.2 GFDL-1.3 GFDL-1.3-only GFDL-1.3-or-later GPL-2.0-only GPL-2.0-or-later GPL-3.0-only
GPL-3.0-or-later LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only LGPL-3.0-or-later LGPLLR MIT-0 NLOD-2.0 O-UDA-1.0
ODbL-1.0 ODC-By-1.0 OGL-Canada-2.0 OGL-UK-3.0 PDDL-1.0 PSF-2.0 Python-2.0 Unicode-3.0 Unicode-DFS-2016
"""
_SPDX = {name.lower(): name for name in f"{_SPDX_AND_HUB} {_SPDX_ALONE}".split()}
# Names of the hub's own -> what SPDX calls the same; None where it has no such text, or a family of them.
_HUB: dict[str, str | None] = {
    "c-uda": "C-UDA-1.0", "lgpl-lr": "LGPLLR", "odbl": "ODbL-1.0", "odc-by": "ODC-By-1.0", "pddl": "PDDL-1.0",
    **dict.fromkeys(("bsd", "cc", "gfdl", "gpl", "lgpl", "openrail", "openrail++")),
    **dict.fromkeys(("bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m")),
    **dict.fromkeys(("creativeml-openrail-m", "deepfloyd-if-license", "fair-noncommercial-research-license")),
    **dict.fromkeys(("apple-amlr", "apple-ascl", "gemma", "h-research", "intel-research", "openmdw-1.0")),
    **dict.fromkeys(("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")),
    **dict.fromkeys(("unknown", "other")),
}  # fmt: skip
_UNKNOWN = {"unknown", "other"}


def is_known(licence: str) -> bool:
    """Tell whether SPDX or the hub has a licence of this name."""
    return licence.lower() in _SPDX or licence.lower() in _HUB


def on_the_hub(licence: str) -> bool:
    """Tell whether the hub takes this name as a card's `license:`; others go beside `other`, as `license_name`."""
    return licence.lower() in _HUB or licence.lower() in _SPDX_AND_HUB.lower().split()


def address(licence: str) -> str | None:
    """Return where SPDX has the licence's text, None for a licence it does not know."""
    name = _SPDX.get(licence.lower()) or _HUB.get(licence.lower())
    return f"https://spdx.org/licenses/{name}.html" if name else None


def licence_warnings(licences: Iterable[str]) -> list[str]:
    """Return one warning for each licence that is unknown or forbids commercial use."""
    found = []
    for licence in licences:
        word = licence.lower()
        if word in _UNKNOWN:
            found.append(f"licence {licence!r} is unknown; check that you may train on it")
        elif re.search(r"(^|-)nc(-|$)", word) or "non-commercial" in word or "noncommercial" in word:
            found.append(f"licence {licence!r} forbids commercial use")
    return found
