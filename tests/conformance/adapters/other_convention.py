"""Misbehaves: rank 1 declares another convention than the others."""

import fake
import ulysses_kit

write = ulysses_kit._write


def other(path, content):
    if str(path).endswith("hello/rank-1.json"):
        content = content.replace(b'"sum"', b'"average"')
    write(path, content)


if __name__ == "__main__":
    ulysses_kit._write = other
    fake.serve()
