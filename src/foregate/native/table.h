// The table of kernels of one instruction set.
#pragma once

#include "kernels.h"
#include "prepare.h"
#include "rows.h"

namespace foregate {
namespace {

template <class Isa>
constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
    Kernels k{};
    k.name = name;
    k.supported = supported;
    k.int8_rows[FG_Q2] = rows<Isa, Int8Product<Isa, FG_Q2>>;
    k.int8_rows[FG_Q3] = rows<Isa, Int8Product<Isa, FG_Q3>>;
    k.int8_rows[FG_Q4] = rows<Isa, Int8Product<Isa, FG_Q4>>;
    k.int8_rows[FG_Q8] = rows<Isa, Int8Product<Isa, FG_Q8>>;
    k.exact_rows[FG_Q2] = rows<Isa, ExactProduct<Isa, FG_Q2>>;
    k.exact_rows[FG_Q3] = rows<Isa, ExactProduct<Isa, FG_Q3>>;
    k.exact_rows[FG_Q4] = rows<Isa, ExactProduct<Isa, FG_Q4>>;
    k.exact_rows[FG_Q8] = rows<Isa, ExactProduct<Isa, FG_Q8>>;
    k.exact_rows[FG_BF16] = rows<Isa, ExactProduct<Isa, FG_BF16>>;
    k.exact_rows[FG_F16] = rows<Isa, ExactProduct<Isa, FG_F16>>;
    k.exact_rows[FG_F32] = rows<Isa, ExactProduct<Isa, FG_F32>>;
    k.prepare = prepare;
    k.activate = activate;
    return k;
}

}  // namespace
}  // namespace foregate
