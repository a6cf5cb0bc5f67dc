"""."""

from pipeline.tools.convert_datasets import CommitOf
from pipeline.tools.convert_parts import Book, Job, Part


def convert_job(job: Job, book: Book, commit_of: CommitOf) -> list[Part]:
    return []
