// A torch with a GPU, pretended on a CPU, so that registration_cuda.cpp runs there unchanged. It knows torch's C
// interface and projection.h alone: of the former, the few functions that tell a GPU from a CPU are defined here, in
// front of torch's; the kernels are the emulation's, a library that pretended_emulation() names.
//
// Every tensor is on cuda:0 unless pretended_move() said otherwise. The ops' CUDA kernels are registered for the CPU,
// and registration.cpp's CPU kernels for a device that nobody has.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <map>
#include <string>

#include "projection.h"

namespace {

constexpr int32_t cpu = -1;
std::map<const void*, int32_t> devices;  // by the first element's address
int32_t current = cpu;                   // the guarded device
void* emulation = nullptr;               // its library
std::string failure;                     // what every kernel shall say, if anything
int32_t calls[2] = {};                   // of the portable path's functions and of Hopper's

int32_t device_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  auto found = devices.find(data);
  return found == devices.end() ? 0 : found->second;
}

void* stream_of(int32_t device) { return reinterpret_cast<void*>(0x1000 + int64_t(device)); }

// What is wrong with how a kernel is called.
const char* misplaced(const fastres::Pixels& x, void* stream) {
  if (!failure.empty()) return failure.c_str();
  auto found = devices.find(x.data);
  int32_t device = found == devices.end() ? 0 : found->second;
  if (current != device) return "the device is not guarded";
  return stream == stream_of(device) ? nullptr : "the stream is not the device's current one";
}

template <class... A>
const char* emulated(const char* kernel, bool hopper, fastres::Dtype dtype, A... arguments) {
  ++calls[hopper];
  auto function = reinterpret_cast<const char* (*)(bool, int, A...)>(dlsym(emulation, kernel));
  return function(hopper, static_cast<int>(dtype), arguments...);
}
int64_t emulated_size(const char* what, bool hopper, const fastres::Shape& s) {
  ++calls[hopper];
  using Size = int64_t (*)(const char*, bool, const fastres::Shape*);
  auto function = reinterpret_cast<Size>(dlsym(emulation, "projection_size"));
  return function(what, hopper, &s);
}

const char* fprop(bool hopper, const fastres::FpropArguments& a, void* stream) {
  if (const char* error = misplaced(a.x, stream)) return error;
  return emulated("projection_fprop", hopper, a.dtype, &a.shape, &a.x, a.weight, a.bn, &a.residual, a.relu, &a.out,
                  a.count, a.mean, a.m2);
}
const char* gram(bool hopper, const fastres::GramArguments& a, void* stream) {
  if (const char* error = misplaced(a.x, stream)) return error;
  return emulated("projection_gram", hopper, a.dtype, &a.shape, &a.x, a.gram, a.total, a.workspace);
}
const char* wgrad(bool hopper, const fastres::WgradArguments& a, void* stream) {
  if (const char* error = misplaced(a.x, stream)) return error;
  return emulated("projection_wgrad", hopper, a.dtype, &a.shape, &a.g, &a.x, &a.out, a.p, a.sum, a.workspace);
}
const char* dgrad(bool hopper, const fastres::DgradArguments& a, void* stream) {
  if (const char* error = misplaced(a.x, stream)) return error;
  return emulated("projection_dgrad", hopper, a.dtype, &a.shape, &a.dx, &a.g, &a.x, &a.out, a.u, a.v, a.k, a.v_scale,
                  a.d, a.relu);
}

}  // namespace

namespace fastres {

const CpuKernels baseline::kernels{};

int64_t portable::fprop_partials(const Shape& s) { return emulated_size("fprop_partials", false, s); }
int64_t portable::gram_workspace(const Shape& s) { return emulated_size("gram_workspace", false, s); }
int64_t portable::wgrad_workspace(const Shape& s) { return emulated_size("wgrad_workspace", false, s); }
int64_t hopper::gram_workspace(const Shape& s) { return emulated_size("gram_workspace", true, s); }
int64_t hopper::wgrad_workspace(const Shape& s) { return emulated_size("wgrad_workspace", true, s); }
const char* portable::fprop(const FpropArguments& a, void* stream) { return ::fprop(false, a, stream); }
const char* portable::gram(const GramArguments& a, void* stream) { return ::gram(false, a, stream); }
const char* portable::wgrad(const WgradArguments& a, void* stream) { return ::wgrad(false, a, stream); }
const char* portable::dgrad(const DgradArguments& a, void* stream) { return ::dgrad(false, a, stream); }
const char* hopper::fprop(const FpropArguments& a, void* stream) { return ::fprop(true, a, stream); }
const char* hopper::gram(const GramArguments& a, void* stream) { return ::gram(true, a, stream); }
const char* hopper::wgrad(const WgradArguments& a, void* stream) { return ::wgrad(true, a, stream); }
const char* hopper::dgrad(const DgradArguments& a, void* stream) { return ::dgrad(true, a, stream); }

}  // namespace fastres

extern "C" {

void pretended_emulation(const char* library) { emulation = dlopen(library, RTLD_NOW | RTLD_NOLOAD); }
// device: of the tensors that begin at data; -1 for the CPU.
void pretended_move(const void* data, int32_t device) { devices[data] = device; }
void pretended_fail(const char* what) { failure = what; }
void pretended_reset() { devices.clear(), failure.clear(), calls[0] = calls[1] = 0; }
int32_t pretended_current_device() { return current; }
int32_t pretended_calls(bool hopper) { return calls[hopper]; }

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library) {
  auto torchs = reinterpret_cast<decltype(&aoti_torch_library_init_impl)>(
      dlsym(RTLD_NEXT, "aoti_torch_library_init_impl"));
  return torchs(ns, std::strcmp(key, "CUDA") == 0 ? "CPU" : "PrivateUse3", file, line, library);
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  *type = device_of(tensor) == cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = device_of(tensor);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int32_t(current));
  current = index;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  auto* before = reinterpret_cast<int32_t*>(guard);
  current = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) {
  *stream = stream_of(device_index);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
