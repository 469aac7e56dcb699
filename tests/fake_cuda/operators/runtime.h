// The part of the fake CUDA runtime that operators use (native/fake.h, exported by libcudart.so.13).
#pragma once

extern "C" {
int fakecuda_is_capturing(void* stream);
int fakecuda_any_capture(void);
int fakecuda_lazy(void);
void fakecuda_count(const char* what);
// Work in stream order: run now, recorded while the stream captures, or delayed with lazy streams.
void fakecuda_enqueue(void* stream, void (*run)(void*), void* context, void (*drop)(void*));
// Launches in between belong to an operator whose numbers the caller computes.
void fakecuda_begin_op(const char* name);
void fakecuda_end_op(void);
}
