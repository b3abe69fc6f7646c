#pragma once

// How the elements of a tensor are stored.
namespace picnn_fast {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace picnn_fast
