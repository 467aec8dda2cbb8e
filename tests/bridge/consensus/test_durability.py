"""What the node writes beside the blocks survives a power loss."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from traincert.regtest.plugin import NetworkFactory
from training_chain import TrainingChain

# For LD_PRELOAD: says, when the file gets its name, whether it was flushed before.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char flushed[4096];

static void note(int fd)
{
    char link[64];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, flushed, sizeof(flushed) - 1);
    flushed[size > 0 ? size : 0] = 0;
}

int fdatasync(int fd)
{
    note(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}

int fsync(int fd)
{
    note(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int rename(const char* from, const char* to)
{
    if (strstr(to, "training_chain_id")) {
        FILE* log = fopen(getenv("RENAMES"), "a");
        fprintf(log, "%s\n", strcmp(flushed, from) == 0 ? "flushed" : "not flushed");
        fclose(log);
    }
    return ((int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""


def test_the_file_with_the_chain_id_is_flushed_before_it_gets_its_name(
    bitcoin_network: NetworkFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, shim, renames = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "renames"
    source.write_text(SHIM)
    subprocess.run(["/usr/bin/cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    monkeypatch.setenv("RENAMES", str(renames))
    bitcoin_network(1, TrainingChain().params.node_options())
    assert renames.read_text() == "flushed\n"
