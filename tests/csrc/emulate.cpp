// The kernels of kernels/csrc/small_m.cuh, run thread by thread on a CPU.
#include <small_m.cuh>

using namespace lowbit;

namespace {

struct Launch {
  SmallM p;

  template <class T, class C>
  void run() {
    const SmallM args = p;
    emulator::launch({C::blocks(p.N), static_cast<unsigned>(p.splits)}, THREADS, C::SHARED_BYTES,
                     [args] { small_m_kernel<T, C>(args); });
    if (p.parts)
      emulator::launch({finish_blocks(p.N), static_cast<unsigned>(p.M)}, THREADS, 0,
                       [args] { finish_kernel<T>(args); });
  }
};

}  // namespace

// x_bytes and qweight_bytes: what copies may read from x and qweight on. Returns what went wrong
extern "C" const char* emulate_small_m(const SmallM* p, int block_m, int warps_n, int is_bf16,
                                       int eager, int64_t x_bytes, int64_t qweight_bytes) {
  emulator::eager = eager;
  emulator::fault = nullptr;
  emulator::readable = {{reinterpret_cast<const unsigned char*>(p->x), x_bytes},
                        {p->qweight, qweight_bytes}};
  Launch launch{*p};
  if (!with_tile(*p, block_m, warps_n, is_bf16, launch)) return "there is no such tile";
  return emulator::fault;
}

extern "C" int args_bytes() { return sizeof(SmallM); }
