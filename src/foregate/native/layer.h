// A product, and a layer's experts, carried out in phases by all threads.
#pragma once

#include "foregate.h"

namespace foregate {

void matmul(const float* x, int64_t tokens, const fg_matrix& matrix, bool exact, float* y);
void moe(const float* x, const fg_expert* experts, int64_t count, const fg_activation& activation, bool exact,
         float* y);

}  // namespace foregate
