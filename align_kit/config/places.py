"""The second place of checkpoints, a folder or any URL of fsspec: what is wrong with it, and what of it is shown."""

from __future__ import annotations

from pathlib import Path

from align_kit import scrub


def public(url: str) -> str:
    """Return a URL without what opens it; a plain path as it is."""
    return str(scrub.scrubbed(url))


def scrubbed(text: str, url: str) -> str:
    """Return a message about `url`, somebody else's perhaps, without what opens it, in the URL or by itself."""
    rest, _, asked = url.partition("://")[2].partition("?")
    user = rest.rpartition("@")[0]
    hidden = [user, user.partition(":")[2], asked, *(pair.partition("=")[2] for pair in asked.split("&"))]
    for secret in filter(None, hidden):
        text = text.replace(secret, scrub.HIDDEN)
    return public(text)


def local_folder(url: str) -> Path | None:
    """Return the folder of this machine that `url` names, `None` where it names another place."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return Path(url).expanduser()
    return Path(rest) if scheme in ("file", "local") else None


def problem(url: str, output_dir: str) -> str | None:
    """Return why checkpoints cannot be copied to `url`: nothing opens it, or it is no second place."""
    folder = local_folder(url)
    if folder is None:
        return _unopened(url)
    if folder.resolve().is_relative_to(Path(output_dir).expanduser().resolve()):
        return f"is {url!r}, which lies in output_dir {output_dir}; name a second place"
    return None


def _unopened(url: str) -> str | None:
    """Return what is missing to open `url`, found without connecting to anything."""
    from fsspec.registry import get_filesystem_class

    for link in url.split("::"):  # fsspec chains: simplecache::s3://…
        scheme = link.partition("://")[0]
        try:
            get_filesystem_class(scheme)
        except ValueError:
            return f"is {public(url)!r}, and fsspec knows no {scheme}://; give a folder, or s3://, gs://, sftp://, …"
        except ImportError as error:
            reason = " ".join(str(error).split())
            return f"is {public(url)!r}, and what opens {scheme}:// is not installed: {reason}"
    return None
