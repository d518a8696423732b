// Exceptions for the .cu files, compiled by the C++ compiler that compiles the bindings.
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "essa_cuda.h"

namespace essa {
namespace cuda {
namespace {

struct Message {
  char text[512];
  Message(const char* format, va_list values) { vsnprintf(text, sizeof text, format, values); }
};

}  // namespace

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  const Message message(format, values);
  va_end(values);
  throw std::runtime_error(message.text);
}

void refuse(const char* format, ...) {
  va_list values;
  va_start(values, format);
  const Message message(format, values);
  va_end(values);
  throw std::invalid_argument(message.text);
}

}  // namespace cuda
}  // namespace essa
