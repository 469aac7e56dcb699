"""The trainer's parameters in one block of shared memory: same values, one handle, visible writes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import torch

from megarl.models.table import Region
from megarl.weights.shared_storage import pool_parameters, share_parameters


def test_pooled_parameters_keep_their_values_and_their_identity() -> None:
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "b": (1,), "c": (17, 4)}
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    values = {name: param.detach().clone() for name, param in params.items()}
    objects = dict(params)
    [buffer] = pool_parameters(params).values()
    addresses = []
    for name, param in params.items():
        assert param is objects[name]
        assert torch.equal(param, values[name])
        assert param.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert param.storage_offset() * 4 % 64 == 0
        addresses.append((param.data_ptr(), param.data_ptr() + param.numel() * 4))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(addresses))


def test_each_type_has_a_buffer_of_its_own() -> None:
    params = {
        "a": torch.nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16)),
        "bias": torch.nn.Parameter(torch.arange(4.0), requires_grad=False),
        "b": torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16)),
    }
    buffers = pool_parameters(params)
    assert {dtype: buffer.numel() for dtype, buffer in buffers.items()} == {
        torch.bfloat16: 64,
        torch.float32: 16,
    }
    assert params["bias"].tolist() == [0.0, 1.0, 2.0, 3.0] and not params["bias"].requires_grad
    assert params["b"].untyped_storage().data_ptr() == params["a"].untyped_storage().data_ptr()


def test_a_mapping_of_the_handle_sees_every_write() -> None:
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("a", (3, 5)), ("b", (7,)))}
    pool_parameters(params)
    regions = [Region("hf.a", ((0, 3), (0, 5)), "a", ((0, 3), (0, 5)))]
    owner = share_parameters(params, regions)
    again = share_parameters(params, regions)  # planning twice shares nothing twice
    assert owner == again and owner.regions == regions
    assert len(owner.storages) == 1
    mapped = torch.UntypedStorage._new_shared_filename_cpu(*owner.storages[0].handle)
    assert mapped.nbytes() == owner.storages[0].num_bytes
    with torch.no_grad():
        params["a"].copy_(torch.arange(15.0).view(3, 5))
        params["b"].fill_(7.0)
    for name, param in params.items():
        source = owner.params[name]
        view = torch.empty(0).set_(mapped, source.offset, source.shape, source.stride)
        assert torch.equal(view, param)
        assert view.data_ptr() != param.data_ptr()  # another mapping of the same memory
        view.mul_(2)
    assert params["b"].tolist() == [14.0] * 7


def test_separate_storages_have_a_handle_each() -> None:
    params = {"a": torch.zeros(4), "b": torch.ones(3)}
    owner = share_parameters(params, [])
    assert [owner.params[name].storage for name in ("a", "b")] == [0, 1]
    assert len({storage.handle for storage in owner.storages}) == 2


def test_a_directory_that_torchs_manager_cannot_use_is_named() -> None:
    """In a process of its own: the manager starts once."""
    code = (
        "import torch\nfrom megarl.errors import UserError\n"
        "from megarl.weights.shared_storage import share_parameters\n"
        "try:\n    share_parameters({'weight': torch.zeros(10)}, [])\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": "/no/such"},
        capture_output=True,
        text=True,
        check=True,
    )
    [line] = done.stdout.splitlines()
    assert line.startswith("TMPDIR: torch's manager of shared memory cannot use '/no/such', whose path is")
