/* libFuzzer over the bytes that strangers can send to the bootstrap: README.md says how to run it. */
#include "bootstrap_input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    return bootstrap_input(data, size);
}
