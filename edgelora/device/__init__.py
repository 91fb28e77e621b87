"""Device profiles, and detection of the machine that this runs on."""

from edgelora.device.cpuinfo import CpuInfo, parse_cpuinfo, read_cpuinfo, select_isa
from edgelora.device.detection import (
    DetectedDevice,
    detect,
    nearest_profile,
    streamed_bandwidth,
)
from edgelora.device.profile import (
    Bandwidth,
    Cluster,
    DeviceProfile,
    Source,
    devices_folder,
    list_profiles,
    load_profile,
    max_context,
    predict_decode_tokens_per_second,
    profile_ids,
)

__all__ = [
    "Bandwidth",
    "Cluster",
    "CpuInfo",
    "DetectedDevice",
    "DeviceProfile",
    "Source",
    "detect",
    "devices_folder",
    "list_profiles",
    "load_profile",
    "max_context",
    "nearest_profile",
    "parse_cpuinfo",
    "predict_decode_tokens_per_second",
    "profile_ids",
    "read_cpuinfo",
    "select_isa",
    "streamed_bandwidth",
]
