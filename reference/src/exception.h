// C++ that Rust calls, and that throws: `exception.rs` is the other side.

#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <exception>
#include <string>

// Takes the text of an exception to the `sink` that Rust gave with it.
using Fail = void (*)(void* sink, const char* text, size_t length);

// Runs `body`. An exception becomes a call of `fail`, and goes no further.
template <typename Body>
void guarded(void* sink, Fail fail, Body body) {
  const auto told = [&](const std::string& text) { fail(sink, text.data(), text.size()); };
  try {
    body();
  } catch (const c10::Error& error) {
    // Without the C++ stack, which says nothing to a reader of Rust.
    told(error.what_without_backtrace());
  } catch (const std::exception& error) {
    told(error.what());
  } catch (...) {
    told("an exception of an unknown kind");
  }
}
