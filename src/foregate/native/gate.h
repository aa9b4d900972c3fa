// Lookahead gates: which experts the next layers will choose, and which of this layer's are used again.
#pragma once

#include "foregate.h"

namespace foregate {

void observe(fg_history& history, const float* scores, const int64_t* chosen, int64_t tokens, int64_t top_k);
void predict(const fg_gate& gate, const float* x, int64_t tokens, float* answers);

}  // namespace foregate
