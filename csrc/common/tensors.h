// A call's tensors as they come from Python, checked before a kernel touches them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/views.h"

namespace py = pybind11;

namespace mvar {

inline int64_t number(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline PyObject* item(const py::tuple& tuple, size_t i) {
  if (i >= tuple.size()) throw py::index_error("a tuple of a call is too short");
  return PyTuple_GET_ITEM(tuple.ptr(), i);
}

inline int64_t entry(const py::tuple& tuple, size_t i) { return number(item(tuple, i)); }

inline float real(const py::tuple& tuple, size_t i) {
  const double value = PyFloat_AsDouble(item(tuple, i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return (float)value;
}

// Pointers from pointers() in mvar_kernels/ffi.py: of each tensor its address, its strides in elements and how many
// bytes its storage holds from that address on, or None. Every access says what a kernel will touch (`sizes`, elements of
// `itemsize` bytes) and raises ValueError, with the tensor's `name`, unless it is all there.
class Tensors {
 public:
  // prefix: of the names, such as "gradient of "
  explicit Tensors(const py::tuple& tensors, const char* prefix = "") : tensors_(tensors), prefix_(prefix) {}

  bool has(size_t i) const { return item(tensors_, i) != Py_None; }

  // (B, L, C)
  Tokens tokens(size_t i, const char* name, const int64_t (&sizes)[3], int64_t itemsize) const {
    const View<3> v = rows(i, name, sizes, itemsize);
    return {v.data, v.strides[0], v.strides[1]};
  }

  // (B, C)
  PerSample per_sample(size_t i, const char* name, const int64_t (&sizes)[2], int64_t itemsize) const {
    const View<2> v = rows(i, name, sizes, itemsize);
    return {v.data, v.strides[0]};
  }

  // (B, L, H, D)
  Heads heads(size_t i, const char* name, const int64_t (&sizes)[4], int64_t itemsize) const {
    const View<4> v = rows(i, name, sizes, itemsize);
    return {v.data, v.strides[0], v.strides[1], v.strides[2]};
  }

  // Contiguous.
  template <typename T, size_t rank>
  T* dense(size_t i, const char* name, const int64_t (&sizes)[rank], int64_t itemsize = sizeof(T)) const {
    const View<rank> v = view(i, name, sizes, itemsize);
    int64_t expected = 1;
    for (size_t d = rank; d-- > 0; expected *= sizes[d]) {
      if (sizes[d] > 1 && v.strides[d] != expected && !empty(sizes)) refuse(name, "expected to be contiguous");
    }
    return (T*)v.data;
  }

  // One element.
  template <typename T>
  T* scalar(size_t i, const char* name) const {
    const py::tuple tensor = present(i, name, 0);
    return (T*)checked(tensor, name, sizeof(T), [] { return std::string("sizes () of one element"); });
  }

  template <size_t rank>
  struct View {
    void* data;
    int64_t strides[rank];
  };

  template <size_t rank>
  View<rank> view(size_t i, const char* name, const int64_t (&sizes)[rank], int64_t itemsize) const {
    const py::tuple tensor = present(i, name, rank);
    View<rank> v;
    for (size_t d = 0; d < rank; ++d) v.strides[d] = number(PyTuple_GET_ITEM(item(tensor, 1), d));
    v.data = checked(tensor, name, extent(sizes, v.strides, itemsize), [&] {
      return "sizes " + words(sizes) + " and strides " + words(v.strides) + " of " + std::to_string(itemsize) + " bytes";
    });
    return v;
  }

 private:
  // The tensor, of so many dimensions.
  py::tuple present(size_t i, const char* name, size_t rank) const {
    PyObject* const tensor = item(tensors_, i);
    if (!PyTuple_Check(tensor)) refuse(name, "expected a tensor, got none");
    PyObject* const strides = item(py::reinterpret_borrow<py::tuple>(tensor), 1);
    if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != Py_ssize_t(rank)) {
      refuse(name, "expected " + std::to_string(rank) + " dimensions");
    }
    return py::reinterpret_borrow<py::tuple>(tensor);
  }

  // Its address, if so many bytes of memory are there; `what` says what they are for.
  template <typename What>
  void* checked(const py::tuple& tensor, const char* name, int64_t needed, What what) const {
    void* const data = (void*)entry(tensor, 0);
    const int64_t available = data == nullptr ? 0 : entry(tensor, 2);
    if (needed < 0 || needed > available) {
      refuse(name, what() + " do not fit its " + std::to_string(available) + " bytes of memory");
    }
    return data;
  }

  // A view with the last dimension contiguous.
  template <size_t rank>
  View<rank> rows(size_t i, const char* name, const int64_t (&sizes)[rank], int64_t itemsize) const {
    const View<rank> v = view(i, name, sizes, itemsize);
    if (sizes[rank - 1] > 1 && v.strides[rank - 1] != 1 && !empty(sizes)) {
      refuse(name, "expected a contiguous last dimension");
    }
    return v;
  }

  // How many bytes there are from the first element to the end of the last one; −1 where that is no number.
  template <size_t rank>
  static int64_t extent(const int64_t (&sizes)[rank], const int64_t (&strides)[rank], int64_t itemsize) {
    int64_t elements = 1, bytes;
    bool wrong = false;
    for (size_t d = 0; d < rank; ++d) {
      int64_t step;
      wrong |= sizes[d] < 0 || strides[d] < 0;
      wrong |= __builtin_mul_overflow(sizes[d] - 1, strides[d], &step);
      wrong |= __builtin_add_overflow(elements, step, &elements);
    }
    wrong |= __builtin_mul_overflow(elements, itemsize, &bytes);
    return wrong ? -1 : empty(sizes) ? 0 : bytes;
  }

  // Of any strides, torch calls such a tensor contiguous.
  template <size_t rank>
  static bool empty(const int64_t (&sizes)[rank]) {
    bool found = false;
    for (int64_t size : sizes) found |= size == 0;
    return found;
  }

  template <size_t rank>
  static std::string words(const int64_t (&numbers)[rank]) {
    std::string text = "(";
    for (size_t d = 0; d < rank; ++d) text += (d ? ", " : "") + std::to_string(numbers[d]);
    return text + ")";
  }

  [[noreturn]] void refuse(const char* name, const std::string& why) const {
    throw py::value_error(std::string(prefix_) + name + ": " + why);
  }

  const py::tuple tensors_;
  const char* prefix_;
};

}  // namespace mvar
