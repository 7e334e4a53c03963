"""Upload a finished checkpoint."""

from __future__ import annotations

from pathlib import Path

from kit.convert.errors import KitError


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a private repository on the hub and return its address.

    Raises:
        KitError: if the upload fails; the folder is untouched.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with kit").commit_url)
    except Exception as error:
        raise KitError(
            f"the upload failed: {str(error).splitlines()[0]}",
            where=f"hub repository {repo}",
            next_step=f"log in with `hf auth login`, then `hf upload {repo} {folder}`; the result is complete on disk",
        ) from error
