// The loop around a compiled step, for CPUs: what rolled/loop.py does in Python, without Python in a step.
//
// The step is a function that Inductor's C++ wrapper made. It takes handles of tensors, which it frees, and fills in
// those of its results. Torch's C functions come as addresses, so that this file needs no header of torch.

#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

using Handle = void*;
using Step = void (*)(Handle* arguments, Handle* results);
using View = int32_t (*)(Handle, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, Handle*);
using Copy = int32_t (*)(Handle, Handle*);
using Free = int32_t (*)(Handle);

// A tensor [length, ...]; row t begins `stride` elements after row t - 1.
struct Rows {
  Handle whole;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t stride;
};

// Returns 0, or 1 with the reason in `message`. Arguments of the step: [*results to write, *state, *inputs, *shared].
extern "C" int32_t highway_native_loop(
    Step step, View view, Copy copy, Free free_handle, int64_t length, int32_t reverse,
    int64_t states, const Rows* results, const Handle* first,
    int64_t inputs, const Rows* read, int64_t shared, const Handle* same,
    char* message, int64_t room) {
  std::vector<Handle> arguments(2 * states + inputs + shared), returned(states);
  try {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t t = reverse ? length - 1 - i : i, before = reverse ? t + 1 : t - 1;
      Handle* next = arguments.data();
      int32_t failed = 0;
      const auto row = [&](const Rows& of, int64_t at) {
        failed |= view(of.whole, of.dims, of.sizes, of.strides, at * of.stride, next++);
      };
      for (int64_t s = 0; s < states; ++s) row(results[s], t);
      for (int64_t s = 0; s < states; ++s) {
        if (i == 0) failed |= copy(first[s], next++);
        else row(results[s], before);
      }
      for (int64_t s = 0; s < inputs; ++s) row(read[s], t);
      for (int64_t s = 0; s < shared; ++s) failed |= copy(same[s], next++);
      if (failed) {
        std::strncpy(message, "torch could not make a view of a row", room - 1);
        return 1;
      }
      step(arguments.data(), returned.data());
      for (Handle result : returned) free_handle(result);
    }
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), room - 1);
    return 1;
  }
  return 0;
}
