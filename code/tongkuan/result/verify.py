"""Predict once more from what manifest.json says, and hold the result against it: the judges' proof.

`./entrypoint.sh verify --submit submit --data data --model weights/model.safetensors`
"""

import hashlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from tongkuan.base.errors import UserError, clip, entrypoint, missing
from tongkuan.base.files import sha256_of
from tongkuan.records.items import item_file, pair_file
from tongkuan.records.result import read_manifest
from tongkuan.records.rows import given
from tongkuan.result.predict import compute
from tongkuan.settings import Precision

# In the order in which one explains the next; what is not named here does not decide the result.
INPUTS = ("model", "items", "pairs", "images_sha256", "encode_batch", "precision", "threshold", "device", "processor")


def verify(submit_dir: Path, data_dir: Path, model_path: Path) -> None:
    """Print that the result is rebuilt to the byte; else raise UserError that names every input that differs.

    Rows are hashed as they are formatted: nothing is written anywhere.
    """
    path = submit_dir / "manifest.json"
    manifest = check_manifest(path, read_manifest(submit_dir))
    result = submit_dir / "result.jsonl"
    if not result.is_file():
        raise missing(result, "no such file; run ./entrypoint.sh predict")
    if sha256_of(result) != manifest["sha256"]["result"]:
        raise UserError(f"{result}: not the file that {path} describes; predict again, or take the one that was made")
    files = {
        "model": model_path,
        "items": given(item_file(data_dir, manifest["split"])),
        "pairs": given(pair_file(data_dir, manifest["split"])),
    }
    for name, file in files.items():  # before hours of work; pictures are hashed on the way
        if file.is_file() and sha256_of(file) != manifest["sha256"][name]:
            raise UserError(f"{file}: another {name} file than the one of {path}; name or restore that one")
    recipe = (manifest["encode_batch"], manifest["precision"], manifest["threshold"])
    blended = manifest.get("blended") is True
    with redirect_stdout(None):  # advice on how to predict is not of this one
        found = compute(data_dir, manifest["split"], model_path, *recipe, None, blended, is_compared=False)
    if found is None:
        return
    digest = hashlib.sha256()
    for row in tqdm(found.rows, desc="hash", unit="pair", total=len(found.rows.pairs), disable=None):
        digest.update(row)
    rebuilt = found.manifest
    rebuilt["sha256"]["result"] = digest.hexdigest()
    if rebuilt["sha256"]["result"] == manifest["sha256"]["result"]:
        print(f"{result}: rebuilt to the byte, sha256 {manifest['sha256']['result']}")
        print(f"next: {entrypoint('check', '--submit', submit_dir, '--pairs', files['pairs'])}")
        return
    raise UserError(f"{result}: rebuilt otherwise; {differences(manifest, rebuilt)}")


def check_manifest(path: Path, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """A manifest with all that `verify` goes by. UserError when it is missing or another program's."""
    if manifest is None:
        raise missing(path, "no such file; run ./entrypoint.sh predict")
    kinds = {"sha256": dict, "versions": dict, "split": str, "encode_batch": int, "threshold": float, "precision": str}
    wrong = [name for name, kind in kinds.items() if type(manifest.get(name)) is not kind]
    wrong += [name for name in ("model", "items", "pairs", "result") if not wrong and name not in manifest["sha256"]]
    if wrong or manifest["precision"] not in get_args(Precision) or manifest["encode_batch"] < 1:
        raise UserError(f"{path}: {clip(', '.join(wrong) or 'precision')} is not as predict writes it; predict again")
    return manifest


def differences(manifest: dict[str, Any], rebuilt: dict[str, Any]) -> str:
    """Which of the things that decide a result are not the same, old and new."""
    before, after = ({**each, **each["sha256"], **each["versions"]} for each in (manifest, rebuilt))
    names = [*INPUTS, *sorted(manifest["versions"].keys() | rebuilt["versions"].keys())]
    differing = [
        f"{name} was {clip(before.get(name), 80)}, is {clip(after.get(name), 80)}"
        for name in names
        if before.get(name) != after.get(name)
    ]
    return (
        "; ".join(differing)
        or "all that the manifest names is the same: this code, or the processor, computes otherwise"
    )
