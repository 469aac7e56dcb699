// libnvidia-ml.so.1: the functions that torch, vLLM, Ray and pynvml call, with the published signatures.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake.h"

namespace {

enum Result { kSuccess = 0, kInvalidArgument = 2, kNotSupported = 3, kNotFound = 6 };
constexpr const char* kDriver = "580.65.06";

// A device handle is its number plus one; NVML ignores CUDA_VISIBLE_DEVICES.
using Device = void*;
int index_of(Device device) { return int(intptr_t(device)) - 1; }
Device handle_of(int index) { return reinterpret_cast<Device>(intptr_t(index) + 1); }

Result text(char* out, unsigned size, const char* value) {
  snprintf(out, size, "%s", value);
  return kSuccess;
}

}  // namespace

extern "C" {

Result nvmlInit() { return kSuccess; }
Result nvmlInit_v2() { return kSuccess; }
Result nvmlInitWithFlags(unsigned) { return kSuccess; }
Result nvmlShutdown() { return kSuccess; }
const char* nvmlErrorString(Result result) { return result == kSuccess ? "Success" : "an error of the fake NVML"; }
Result nvmlSystemGetDriverVersion(char* out, unsigned size) { return text(out, size, kDriver); }
Result nvmlSystemGetNVMLVersion(char* out, unsigned size) { return text(out, size, "13.580.65.06"); }
Result nvmlSystemGetCudaDriverVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
Result nvmlSystemGetCudaDriverVersion_v2(int* version) { return nvmlSystemGetCudaDriverVersion(version); }

Result nvmlDeviceGetCount_v2(unsigned* count) {
  *count = unsigned(fakecuda_physical_count());
  return kSuccess;
}
Result nvmlDeviceGetCount(unsigned* count) { return nvmlDeviceGetCount_v2(count); }
Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device* device) {
  if (int(index) >= fakecuda_physical_count()) return kInvalidArgument;
  *device = handle_of(int(index));
  return kSuccess;
}
Result nvmlDeviceGetHandleByIndex(unsigned index, Device* device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }
Result nvmlDeviceGetHandleByUUID(const char* uuid, Device* device) {
  if (strlen(uuid) < 2) return kNotFound;
  return nvmlDeviceGetHandleByIndex_v2(unsigned(strtol(uuid + strlen(uuid) - 2, nullptr, 16)), device);
}
Result nvmlDeviceGetHandleByPciBusId_v2(const char* bus, Device* device) {
  const char* colon = strchr(bus, ':');
  return colon ? nvmlDeviceGetHandleByIndex_v2(unsigned(strtol(colon + 1, nullptr, 16) - 0x10), device) : kNotFound;
}
Result nvmlDeviceGetIndex(Device device, unsigned* index) {
  *index = unsigned(index_of(device));
  return kSuccess;
}
Result nvmlDeviceGetMinorNumber(Device device, unsigned* number) { return nvmlDeviceGetIndex(device, number); }
Result nvmlDeviceGetName(Device, char* out, unsigned size) { return text(out, size, fakecuda_device_name()); }
Result nvmlDeviceGetUUID(Device device, char* out, unsigned size) {
  unsigned char u[16];
  fakecuda_uuid(u, index_of(device));
  char value[48];
  snprintf(value, sizeof value, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
           u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
  return text(out, size, value);
}
Result nvmlDeviceGetCudaComputeCapability(Device device, int* major, int* minor) {
  *major = fakecuda_attribute(75, index_of(device));
  *minor = fakecuda_attribute(76, index_of(device));
  return kSuccess;
}

struct Memory {
  unsigned long long total, free, used;
};
Result nvmlDeviceGetMemoryInfo(Device device, Memory* memory) {
  memory->total = fakecuda_capacity();
  memory->used = std::min<unsigned long long>(memory->total, fakecuda_used(index_of(device)));
  memory->free = memory->total - memory->used;
  return kSuccess;
}
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
Result nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2* memory) {
  Memory plain;
  nvmlDeviceGetMemoryInfo(device, &plain);
  memory->total = plain.total;
  memory->reserved = 0;
  memory->free = plain.free;
  memory->used = plain.used;
  return kSuccess;
}
struct Pci {
  char legacy_bus_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
};
Result nvmlDeviceGetPciInfo_v3(Device device, Pci* pci) {
  memset(pci, 0, sizeof *pci);
  pci->bus = unsigned(0x10 + index_of(device));
  snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
  snprintf(pci->legacy_bus_id, sizeof pci->legacy_bus_id, "0000:%02X:00.0", pci->bus);
  return kSuccess;
}

Result nvmlDeviceGetP2PStatus(Device, Device, int, int* status) {
  *status = 0;
  return kSuccess;
}
Result nvmlDeviceGetTopologyCommonAncestor(Device, Device, int* level) {
  *level = 10;
  return kSuccess;
}
Result nvmlDeviceGetNvLinkState(Device, unsigned, int* state) {
  *state = 0;
  return kSuccess;
}
Result nvmlDeviceGetNvLinkRemoteDeviceType(Device, unsigned, int*) { return kNotSupported; }
Result nvmlDeviceGetNvLinkRemotePciInfo_v2(Device, unsigned, void*) { return kNotSupported; }
// torch asks for it when it reserves expandable segments. All versions begin alike.
struct FabricInfo {
  unsigned version;
  unsigned char cluster_uuid[16];
  int status;
  unsigned clique_id;
  unsigned char state;
};
Result nvmlDeviceGetGpuFabricInfoV(Device, FabricInfo* info) {
  *info = {info->version, {}, kSuccess, 0, 0};  // 0: there is no fabric
  return kSuccess;
}
Result nvmlDeviceGetUtilizationRates(Device, unsigned* percent) {
  percent[0] = percent[1] = 0;
  return kSuccess;
}
Result nvmlDeviceGetMigMode(Device, unsigned* current, unsigned* pending) {
  *current = *pending = 0;
  return kSuccess;
}
Result nvmlDeviceGetComputeRunningProcesses(Device, unsigned* count, void*) {
  *count = 0;
  return kSuccess;
}
Result nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned* count, void* out) {
  return nvmlDeviceGetComputeRunningProcesses(device, count, out);
}
Result nvmlDeviceGetGraphicsRunningProcesses_v3(Device device, unsigned* count, void* out) {
  return nvmlDeviceGetComputeRunningProcesses(device, count, out);
}
Result nvmlDeviceGetPowerUsage(Device, unsigned* milliwatts) {
  *milliwatts = 100000;
  return kSuccess;
}
Result nvmlDeviceGetTemperature(Device, int, unsigned* degrees) {
  *degrees = 40;
  return kSuccess;
}
Result nvmlDeviceGetClockInfo(Device, int, unsigned* megahertz) {
  *megahertz = 1980;
  return kSuccess;
}
Result nvmlDeviceGetCpuAffinity(Device, unsigned words, unsigned long* set) {
  memset(set, 0xff, words * sizeof *set);
  return kSuccess;
}
Result nvmlDeviceGetNumaNodeId(Device, unsigned* node) {
  *node = 0;
  return kSuccess;
}

}  // extern "C"
