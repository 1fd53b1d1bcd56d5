"""The device that the kernels' tests run on."""

from tests.kernels.conftest import device as device
