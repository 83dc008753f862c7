"""The records of prompts, found again by the prompt ids of the sequences that came from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.prompts import PromptOptions
from lopd.data.prompts import MAX_LINE, load_prompts, prompt_of
from lopd.data.records import MAX_RECORD, describe_data, read_records
from lopd.data.rendering import PromptEncoder, parse_date
from lopd.data.shapes import shaped
from lopd.errors import DataError, MissingFileError
from lopd.models.load import load_tokenizer
from lopd.provenance import Manifest


@dataclass(frozen=True)
class Record:
    """The record of a prompt."""

    name: str  # id of the prompt
    place: str
    fields: dict[str, Any]


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

    def find(self, prompts: Mapping[str, np.ndarray], student: str) -> Iterator[Record]:
        """Yield the records of prompts: one each, several of imported ones that share an id.

        Args:
            prompts: token ids of each prompt by its id, as they are in its sequences.
            student: folder of the model that made the rollouts, whose tokenizer decides the ids.

        Raises:
            DataError: a prompt has no record, or its record holds another prompt.
        """
        names = None if self.imported else self._names(prompts, student)
        absent = set(prompts)
        skip = _ignore if self.imported or self.reading.get("skip_bad_records") else None
        longest = MAX_RECORD if self.imported else MAX_LINE
        for where, record in read_records(self.path, max_bytes=longest, skip=skip):
            given = record.get("id") if names is None else names.get(where)
            if given is None or (name := str(given)) not in prompts:
                continue
            absent.discard(name)
            yield Record(name, where, self._fields(record, where))
        if absent:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise DataError(
                f"{self.path}: has no record of the rollouts' prompt '{min(absent)}'{more}; name "
                f"the file {'with these ids' if self.imported else 'they were sampled from'} with "
                "--prompts"
            )

    def _names(self, prompts: Mapping[str, np.ndarray], student: str) -> dict[str, str]:
        """The ids of prompts by the places of their records."""
        names: dict[str, str] = {}
        for prompt in load_prompts(self.path, self._encoder(student), limit=self.limit):
            if prompt.id not in prompts:
                continue
            if prompt.tokens != prompts[prompt.id].tolist():
                raise DataError(
                    f"{prompt.place}: prompt '{prompt.id}' is another than that of the rollouts; "
                    "name the file that they were sampled from with --prompts"
                )
            names[prompt.place] = prompt.id
        return names

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


def _ignore(error: DataError) -> None:
    """A record that cannot be read was left out, and named, when the rollouts were made."""
