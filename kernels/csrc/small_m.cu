// torch.ops.lowbit.linear_small_m: checks, launches and registration, on PyTorch's stable ABI.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <small_m.cuh>

#include <atomic>
#include <initializer_list>
#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace lowbit {
namespace {

// PyTorch's current stream. The function is part of the stable ABI, but builds of PyTorch without
// CUDA lack it, and this library must load there: so it is looked up when the first kernel starts
cudaStream_t current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function != nullptr, "linear_small_m needs a build of PyTorch with CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "linear_small_m: ", cudaGetErrorString(error));
}

struct Launch {
  SmallM p;
  int device;
  bool overlaps_previous;
  cudaStream_t stream;

  template <class T, class C>
  void run() {
    allow_shared_memory<T, C>();
    start(small_m_kernel<T, C>, dim3(C::blocks(p.N), p.splits), C::SHARED_BYTES, overlaps_previous);
    // it reads nothing that the kernel above does not order
    if (p.parts) start(finish_kernel<T>, dim3(finish_blocks(p.N), p.M), 0, true);
  }

 private:
  // more than 48 KB has to be asked for, once a device
  template <class T, class C>
  void allow_shared_memory() {
    static std::atomic<uint64_t> done{0};
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (device < 64 && done.load() & bit) return;
    check(cudaFuncSetAttribute(small_m_kernel<T, C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               C::SHARED_BYTES));
    done |= bit;
  }

  void start(void (*kernel)(SmallM), dim3 grid, size_t shared_bytes, bool overlaps) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlaps && major >= 9 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, p));
  }
};

template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& x, ScalarType dtype,
                  std::initializer_list<int64_t> sizes, bool contiguous = true) {
  bool fits = tensor.scalar_type() == dtype && tensor.is_cuda() &&
              tensor.get_device_index() == x.get_device_index() &&
              tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && tensor.size(d++) == size;
  fits = fits && (contiguous ? tensor.is_contiguous() : tensor.stride(d - 1) == 1);
  STD_TORCH_CHECK(fits, "linear_small_m: ", name, " has a wrong shape, dtype, device or layout");
}

int log2_of(int64_t size) {
  int shift = 0;
  while (int64_t{1} << shift < size) shift++;
  return shift;
}

// The arguments are those of SmallM; epilogue numbers its enum, block_m and warps_n name a tile.
void linear_small_m(Tensor x, Tensor qweight, Tensor scale, std::optional<Tensor> group_scale,
                    std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t group_size,
                    int64_t epilogue, int64_t block_m, int64_t warps_n, bool static_weight,
                    Tensor y, std::optional<Tensor> parts) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && x.stride(1) == 1 &&
                      (dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "linear_small_m: x must be [M, K] of fp16 or bf16 on a GPU, its last stride 1");
  STD_TORCH_CHECK(qweight.dim() == 2, "linear_small_m: qweight must be [N, bytes]");
  const int64_t M = x.size(0), K = x.size(1), N = qweight.size(0);
  const int64_t groups = group_scale ? (K + group_size - 1) / group_size : 0;
  const int64_t splits = parts ? parts->size(0) : 1;
  STD_TORCH_CHECK(M >= 1 && M <= block_m && N >= 1 && K >= 1 && splits >= 1 && splits <= 65535 &&
                      epilogue >= NONE && epilogue <= RELU,
                  "linear_small_m: M, N, K, the splits or the epilogue are out of range");
  // 32-bit arithmetic: k, rows of the group scales
  STD_TORCH_CHECK(K < (int64_t{1} << 30) && N * (groups + 1) < (int64_t{1} << 31),
                  "linear_small_m: the weight is too large");
  STD_TORCH_CHECK(!group_scale || (group_size >= 32 && (group_size & (group_size - 1)) == 0),
                  "linear_small_m: group_size must be a power of two of at least 32");
  check_tensor("qweight", qweight, x, ScalarType::Byte, {N, (K + 63) / 64 * 32});
  check_tensor("scale", scale, x, ScalarType::Float, {N});
  check_tensor("y", y, x, dtype, {M, N});
  if (group_scale) check_tensor("group_scale", *group_scale, x, ScalarType::Byte, {N, groups});
  if (bias) check_tensor("bias", *bias, x, dtype, {N});
  if (residual) check_tensor("residual", *residual, x, dtype, {M, N}, false);
  if (parts) check_tensor("parts", *parts, x, ScalarType::Float, {splits, M, N});
  const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); };
  STD_TORCH_CHECK(address(x) % 16 == 0 && (M == 1 || x.stride(0) % 8 == 0) &&
                      address(qweight) % 16 == 0,
                  "linear_small_m: rows of x and of qweight must begin at multiples of 16 bytes");

  SmallM p = {};
  p.x = static_cast<const uint16_t*>(x.data_ptr());
  p.x_stride = M == 1 ? 0 : x.stride(0);  // of one row it may be anything
  p.qweight = static_cast<const uint8_t*>(qweight.data_ptr());
  p.pitch = static_cast<int>(qweight.size(1));
  p.scale = static_cast<const float*>(scale.data_ptr());
  p.group_scale = pointer<const uint8_t>(group_scale);
  p.num_groups = static_cast<int>(groups);
  p.group_shift = group_scale ? log2_of(group_size) : 0;
  p.bias = pointer<const uint16_t>(bias);
  p.residual = pointer<const uint16_t>(residual);
  p.residual_stride = residual ? residual->stride(0) : 0;
  p.y = static_cast<uint16_t*>(y.data_ptr());
  p.parts = pointer<float>(parts);
  p.M = static_cast<int>(M);
  p.N = static_cast<int>(N);
  p.K = static_cast<int>(K);
  p.epilogue = static_cast<int>(epilogue);
  p.splits = static_cast<int>(splits);

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Launch launch{p, device, static_weight, current_stream(device)};
  const bool known = with_tile(p, static_cast<int>(block_m), static_cast<int>(warps_n),
                               dtype == ScalarType::BFloat16, launch);
  STD_TORCH_CHECK(known, "linear_small_m: there is no tile of ", block_m, " rows and ", warps_n,
                  " warps");
}

}  // namespace
}  // namespace lowbit

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit, m) {
  m.def(
      "linear_small_m(Tensor x, Tensor qweight, Tensor scale, Tensor? group_scale, Tensor? bias, "
      "Tensor? residual, int group_size, int epilogue, int block_m, int warps_n, "
      "bool static_weight, Tensor(a!) y, Tensor(b!)? parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CUDA, m) {
  m.impl("linear_small_m", TORCH_BOX(&lowbit::linear_small_m));
}
