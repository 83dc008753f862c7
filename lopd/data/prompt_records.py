"""The records of prompts, found again by the prompt ids of the sequences that came from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.prompts import PromptOptions
from lopd.data.prompts import MAX_LINE, load_prompts, prompt_of
from lopd.data.records import describe_data, read_records
from lopd.data.rendering import PromptEncoder, parse_date
from lopd.data.shapes import shaped
from lopd.errors import DataError, MissingFileError
from lopd.models.load import load_tokenizer
from lopd.provenance import Manifest

Record = tuple[str, dict[str, Any]]  # its place, and its fields, under lopd's names too


@dataclass(frozen=True)
class RecordSource:
    """A file of records, and how the prompts in it were read."""

    path: str
    reading: Mapping[str, Any]  # settings of `PromptOptions`, and the date
    limit: int | None  # only the first records were read
    imported: bool  # the sequences come from another tool; only an `id` ties them to records

    @classmethod
    def of(cls, rollouts: Manifest, path: str | None) -> "RecordSource":
        """That of rollouts.

        Args:
            path: another file with the same prompts, such as one with more fields.

        Raises:
            MissingFileError: the file that the rollouts name is not there.
            DataError: it was altered.
        """
        imported = rollouts.stage == "import"
        recorded = rollouts.inputs.get("source" if imported else "prompts") or {}
        settings = (dict(recorded.get("reading") or {}), rollouts.config.get("limit"), imported)
        if path is not None:
            return cls(path, *settings)
        path = recorded.get("path")
        if path is None or not Path(path).exists():
            raise MissingFileError(
                f"prompts: the rollouts were made from {path or 'an unknown file'}, which is not "
                "there; name the file of their prompts with --prompts"
            )
        if describe_data(path)["sha256"] != recorded.get("sha256"):
            raise DataError(
                f"{path}: altered since the rollouts were made from it; restore it, or name the "
                "file to read with --prompts"
            )
        return cls(path, *settings)

    def find(self, prompts: Mapping[str, np.ndarray], student: str) -> dict[str, list[Record]]:
        """The records of prompts by id: one each, several of imported ones that share an id.

        Args:
            prompts: token ids of each prompt, as they are in its sequences.
            student: folder of the model that made the rollouts, whose tokenizer decides the ids.

        Raises:
            DataError: a prompt has no record, or its record holds another prompt.
        """
        found: dict[str, list[str]] = {}  # places
        records = dict(self._records())
        if self.imported:
            for where, record in records.items():
                if (name := str(record.get("id"))) in prompts:
                    found.setdefault(name, []).append(where)
        else:
            for prompt in load_prompts(self.path, self._encoder(student), limit=self.limit):
                if prompt.id in prompts:
                    found[prompt.id] = [prompt.place]
                    if prompt.tokens != prompts[prompt.id].tolist():
                        raise DataError(
                            f"{prompt.place}: prompt '{prompt.id}' is another than that of the "
                            "rollouts; name the file that they were sampled from with --prompts"
                        )
        if absent := sorted(prompts.keys() - found.keys()):
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise DataError(
                f"{self.path}: has no record of the rollouts' prompt '{absent[0]}'{more}; name the "
                f"file {'with these ids' if self.imported else 'they were sampled from'} with "
                "--prompts"
            )
        return {
            name: [(where, self._fields(records[where], where)) for where in places]
            for name, places in found.items()
        }

    def _records(self) -> list[Record]:
        skip = (lambda error: None) if self.reading.get("skip_bad_records") else None
        return list(read_records(self.path, max_bytes=MAX_LINE, skip=skip))

    def _encoder(self, student: str) -> PromptEncoder:
        options = {name: value for name, value in self.reading.items() if name != "date"}
        return PromptEncoder(load_tokenizer(student), PromptOptions(**options), self.date)

    @property
    def date(self) -> date | None:
        """The date that chat templates wrote into the prompts, if they wrote one."""
        text = self.reading.get("date")
        return None if text is None else parse_date(text, self.path)

    def _fields(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        """Every column of a record, those that have a name in lopd under that too, and `messages`.

        These are the student's prompt as messages; records of other tools hold the answer in them.
        """
        if self.imported:
            return record
        options = PromptOptions(columns=self.reading.get("columns"))
        named = shaped(record, where, options.column_map()).fields
        prompt = prompt_of(named, where)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return record | named | {"messages": prompt}
