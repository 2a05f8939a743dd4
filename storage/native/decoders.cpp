// Weights in few bits to floats, on the CPU: the same bits as the decoders in `storage/codecs`, which say what each format is.
// Plain C functions over memory that the caller owns. Compiled with -ffp-contract=off: a product and a sum round twice there.

#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) { return bits_of<float>(uint32_t(value.bits) << 16); }
inline float to_float(_Float16 value) { return float(value); }
inline float to_float(float value) { return value; }

inline void store(float& out, float value) { out = value; }
inline void store(_Float16& out, float value) { out = _Float16(value); }
// To the nearest, ties to even.
inline void store(BFloat16& out, float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out.bits = uint16_t((value != value ? 0x7fc00000 : rounded) >> 16);
}

template <class T>
inline T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}
inline float half(const uint8_t* at) { return to_float(load<_Float16>(at)); }

// 2 ** (exponent - 127), as torch's exp2 has it: subnormal at 0, infinite at 255.
inline float power(uint8_t exponent) {
  if (exponent == 255) return std::numeric_limits<float>::infinity();
  return bits_of<float>(exponent ? uint32_t(exponent) << 23 : 0x00400000u);
}

// ---- Block types of GGUF: each takes one block and writes its numbers. Order of operations: ggml-quants.c.

// GCC unrolls short loops before it could make vectors of them: a third of the speed.
#if defined(__GNUC__) && !defined(__clang__)
#define ROLLED _Pragma("GCC unroll 1")
#else
#define ROLLED
#endif

struct Q4_0 {
  static constexpr int numbers = 32, bytes = 18;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], float((block[2 + i] & 15) - 8) * scale);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], float((block[2 + i] >> 4) - 8) * scale);
  }
};

struct Q4_1 {
  static constexpr int numbers = 32, bytes = 20;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block), least = half(block + 2);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], float(block[4 + i] & 15) * scale + least);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], float(block[4 + i] >> 4) * scale + least);
  }
};

struct Q5_0 {
  static constexpr int numbers = 32, bytes = 22;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block);
    const uint32_t high = load<uint32_t>(block + 2);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], float(int((block[6 + i] & 15) | ((high >> i) & 1) << 4) - 16) * scale);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], float(int((block[6 + i] >> 4) | ((high >> (16 + i)) & 1) << 4) - 16) * scale);
  }
};

struct Q5_1 {
  static constexpr int numbers = 32, bytes = 24;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block), least = half(block + 2);
    const uint32_t high = load<uint32_t>(block + 4);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], float(int((block[8 + i] & 15) | ((high >> i) & 1) << 4)) * scale + least);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], float(int((block[8 + i] >> 4) | ((high >> (16 + i)) & 1) << 4)) * scale + least);
  }
};

struct Q8_0 {
  static constexpr int numbers = 32, bytes = 34;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block);
    ROLLED for (int i = 0; i < 32; ++i) store(out[i], float(int8_t(block[2 + i])) * scale);
  }
};

struct Q2_K {
  static constexpr int numbers = 256, bytes = 84;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block + 80), minimum = half(block + 82);
    for (int group = 0; group < 16; ++group) {
      const float times = scale * float(block[group] & 15), less = minimum * float(block[group] >> 4);
      const uint8_t* data = block + 16 + (group / 8) * 32 + (group % 2) * 16;
      const int shift = (group % 8) / 2 * 2;
      ROLLED for (int i = 0; i < 16; ++i) store(out[group * 16 + i], float((data[i] >> shift) & 3) * times - less);
    }
  }
};

struct Q3_K {
  static constexpr int numbers = 256, bytes = 110;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block + 108);
    for (int group = 0; group < 16; ++group) {
      const int low = (block[96 + group % 8] >> (group / 8 * 4)) & 15, high = (block[104 + group % 4] >> (group / 4 * 2)) & 3;
      const float times = scale * float((low | high << 4) - 32);
      const uint8_t* data = block + 32 + (group / 8) * 32 + (group % 2) * 16;
      const uint8_t* mask = block + (group % 2) * 16;
      const int shift = (group % 8) / 2 * 2, bit = group / 2;
      // A bit that is not set takes four away.
      ROLLED for (int i = 0; i < 16; ++i)
        store(out[group * 16 + i], float(((data[i] >> shift) & 3) - 4 + ((mask[i] >> bit) & 1) * 4) * times);
    }
  }
};

// Scale and minimum of one of eight groups: six bits each, in twelve bytes.
inline void scale_and_minimum(const uint8_t* packed, int group, int& scale, int& minimum) {
  if (group < 4) {
    scale = packed[group] & 63;
    minimum = packed[4 + group] & 63;
  } else {
    scale = (packed[4 + group] & 15) | ((packed[group - 4] >> 6) << 4);
    minimum = (packed[4 + group] >> 4) | ((packed[group] >> 6) << 4);
  }
}

struct Q4_K {
  static constexpr int numbers = 256, bytes = 144;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block), least = half(block + 2);
    for (int group = 0; group < 8; ++group) {
      int s, m;
      scale_and_minimum(block + 4, group, s, m);
      const float times = scale * float(s), less = least * float(m);
      const uint8_t* data = block + 16 + (group / 2) * 32;
      const int shift = group % 2 * 4;
      ROLLED for (int i = 0; i < 32; ++i) store(out[group * 32 + i], float((data[i] >> shift) & 15) * times - less);
    }
  }
};

struct Q5_K {
  static constexpr int numbers = 256, bytes = 176;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block), least = half(block + 2);
    for (int group = 0; group < 8; ++group) {
      int s, m;
      scale_and_minimum(block + 4, group, s, m);
      const float times = scale * float(s), less = least * float(m);
      const uint8_t *data = block + 48 + (group / 2) * 32, *high = block + 16;
      const int shift = group % 2 * 4;
      ROLLED for (int i = 0; i < 32; ++i)
        store(out[group * 32 + i], float(((data[i] >> shift) & 15) | ((high[i] >> group) & 1) << 4) * times - less);
    }
  }
};

struct Q6_K {
  static constexpr int numbers = 256, bytes = 210;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block + 208);
    for (int group = 0; group < 16; ++group) {
      const float times = scale * float(int8_t(block[192 + group]));
      const int place = group % 8;  // sixteen numbers each; two of 64 low bytes serve 128 numbers, low nibbles first
      const uint8_t* low = block + (group / 8) * 64 + (place % 4) * 16;
      const uint8_t* high = block + 128 + (group / 8) * 32 + (place % 2) * 16;
      const int shift = place / 4 * 4, high_shift = place / 2 * 2;
      ROLLED for (int i = 0; i < 16; ++i)
        store(out[group * 16 + i], float((((low[i] >> shift) & 15) | ((high[i] >> high_shift) & 3) << 4) - 32) * times);
    }
  }
};

constexpr float IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float FP4_LEVELS[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct IQ4_NL {
  static constexpr int numbers = 32, bytes = 18;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], IQ4_LEVELS[block[2 + i] & 15] * scale);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], IQ4_LEVELS[block[2 + i] >> 4] * scale);
  }
};

struct IQ4_XS {
  static constexpr int numbers = 256, bytes = 136;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    const float scale = half(block);
    const int highs = load<uint16_t>(block + 2);
    for (int group = 0; group < 8; ++group) {
      const int low = (block[4 + group / 2] >> (group % 2 * 4)) & 15, high = (highs >> (2 * group)) & 3;
      const float times = scale * float((low | high << 4) - 32);
      const uint8_t* data = block + 8 + group * 16;
      ROLLED for (int i = 0; i < 16; ++i) {
        store(out[group * 32 + i], IQ4_LEVELS[data[i] & 15] * times);
        store(out[group * 32 + 16 + i], IQ4_LEVELS[data[i] >> 4] * times);
      }
    }
  }
};

struct MXFP4 {
  static constexpr int numbers = 32, bytes = 17;
  template <class Out>
  static void decode(const uint8_t* __restrict block, Out* __restrict out) {
    // Half of 2 ** (e - 127), since the levels are twice what they stand for.
    const uint32_t e = block[0];
    const float scale = bits_of<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    ROLLED for (int i = 0; i < 16; ++i) store(out[i], FP4_LEVELS[block[1 + i] & 15] * scale);
    ROLLED for (int i = 0; i < 16; ++i) store(out[16 + i], FP4_LEVELS[block[1 + i] >> 4] * scale);
  }
};

// `head_rows`: of a head, whose two halves took turns and are put one after the other; 0 where rows are in their order.
template <class Block, class Out>
void decode_blocks(const uint8_t* in, int64_t first, int64_t last, int64_t row_blocks, int64_t head_rows, Out* out) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t place = head_rows ? row % head_rows : 0;
    const int64_t to = head_rows ? row - place + place % 2 * (head_rows / 2) + place / 2 : row;
    const uint8_t* data = in + row * row_blocks * Block::bytes;
    Out* numbers = out + to * row_blocks * Block::numbers;
    for (int64_t block = 0; block < row_blocks; ++block)
      Block::decode(data + block * Block::bytes, numbers + block * Block::numbers);
  }
}

// ---- 8-bit numbers with scales beside them.

// Subnormals are made of their integer: a product of subnormal floats takes a processor a hundred times as long.
inline float e4m3(uint8_t byte) {
  const uint32_t rest = byte & 0x7f, sign = uint32_t(byte & 0x80) << 24;
  uint32_t bits = (rest << 20) + (120u << 23);
  bits = rest < 8 ? bits_of<uint32_t>(float(int(rest)) * 0x1p-9f) : bits;
  bits = rest == 0x7f ? 0x7fc00000u : bits;
  return bits_of<float>(bits | sign);
}

inline float e5m2(uint8_t byte) {
  const uint32_t rest = byte & 0x7f, sign = uint32_t(byte & 0x80) << 24;
  uint32_t bits = (rest << 21) + (112u << 23);
  bits = rest < 4 ? bits_of<uint32_t>(float(int(rest)) * 0x1p-16f) : bits;
  bits = rest >= 0x7c ? 0x7f800000u | (rest & 3) << 21 : bits;
  return bits_of<float>(bits | sign);
}

inline float int8(uint8_t byte) { return float(int8_t(byte)); }

template <float (*Number)(uint8_t), class Out>
void decode_tiles(const uint8_t* in, int64_t first, int64_t last, int64_t columns, const float* scales, float factor,
                  int64_t tile_rows, int64_t tile_columns, Out* out) {
  const int64_t across = columns / tile_columns;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t tile = 0; tile < across; ++tile) {
      const float scale = scales[row / tile_rows * across + tile];
      const int64_t at = row * columns + tile * tile_columns;
      for (int64_t i = 0; i < tile_columns; ++i) store(out[at + i], Number(in[at + i]) * scale * factor);
    }
  }
}

// ---- Four bits that stand for one of sixteen numbers, the first in the high ones; `block` is even.
template <class Out>
void decode_four_bits(const uint8_t* in, int64_t first, int64_t last, int64_t count, int64_t block, const float* scales,
                      const float* numbers, Out* out) {
  for (int64_t at = first; at < last; ++at) {
    const float scale = scales[at];
    const int64_t begin = at * block, end = begin + block < count ? begin + block : count;
    for (int64_t i = begin / 2; i < end / 2; ++i) {
      store(out[2 * i], numbers[in[i] >> 4] * scale);
      store(out[2 * i + 1], numbers[in[i] & 15] * scale);
    }
    if (end % 2) store(out[end - 1], numbers[in[end / 2] >> 4] * scale);
  }
}

// ---- Integers in words of 32 bits.

// `shared`: all rows have the same scales. `zeros`: none where the number in the middle of the range is zero for all.
template <int Bits, class Scale, class Out>
void decode_packed_rows(const uint8_t* in, int64_t first, int64_t last, int64_t columns, int64_t row_bytes,
                        const Scale* scales, bool shared, const float* zeros, int64_t groups, Out* out) {
  const int64_t together = columns / groups;
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* data = in + row * row_bytes;
    for (int64_t group = 0; group < groups; ++group) {
      const float scale = to_float(scales[(shared ? 0 : row * groups) + group]);
      const float zero = zeros ? zeros[row * groups + group] : float(1 << (Bits - 1));
      const int64_t begin = group * together, end = begin + together;
      Out* to = out + row * columns;
      if (Bits == 8) {
        for (int64_t i = begin; i < end; ++i) store(to[i], (float(data[i]) - zero) * scale);
      } else if (begin % 2 || end % 2) {
        for (int64_t i = begin; i < end; ++i) store(to[i], (float((data[i / 2] >> (i % 2 * 4)) & 15) - zero) * scale);
      } else {
        for (int64_t i = begin / 2; i < end / 2; ++i) {
          store(to[2 * i], (float(data[i] & 15) - zero) * scale);
          store(to[2 * i + 1], (float(data[i] >> 4) - zero) * scale);
        }
      }
    }
  }
}

// ---- The same with inputs along the rows, as GPTQ and AWQ have them: tiles are computed along the outputs, as they lie, and
// turned over on their way out.

constexpr int64_t TILE = 32;  // inputs and outputs

template <class Out>
void turn_over(const Out (&tile)[TILE][TILE], int64_t input_count, int64_t output_count, int64_t inputs, Out* out) {
  for (int64_t output = 0; output < output_count; ++output)
    for (int64_t input = 0; input < input_count; ++input) out[output * inputs + input] = tile[input][output];
}

// `Unpack` gives the number of an input and an output, at the tile's first ones: a plain struct, so that it is inlined.
template <class Unpack, class Out>
void decode_columns(Unpack unpack, int64_t first_tile, int64_t last_tile, int64_t outputs, int64_t inputs,
                    const float* scales, const float* zeros, const int32_t* group_of, Out* out) {
  Out tile[TILE][TILE];
  for (int64_t first = first_tile * TILE; first < outputs && first < last_tile * TILE; first += TILE) {
    const int64_t output_count = outputs - first < TILE ? outputs - first : TILE;
    for (int64_t begin = 0; begin < inputs; begin += TILE) {
      const int64_t input_count = inputs - begin < TILE ? inputs - begin : TILE;
      for (int64_t input = 0; input < input_count; ++input) {
        const int64_t at = group_of[begin + input] * outputs + first;
        int32_t numbers[TILE];
        unpack(begin + input, first, output_count, numbers);
        for (int64_t i = 0; i < output_count; ++i) store(tile[input][i], (float(numbers[i]) - zeros[at + i]) * scales[at + i]);
      }
      turn_over(tile, input_count, output_count, inputs, out + first * inputs + begin);
    }
  }
}

// Words hold neighbouring inputs of one output.
template <int Bits>
struct Gptq {
  const uint32_t* words;
  int64_t outputs;
  void operator()(int64_t input, int64_t output, int64_t count, int32_t* numbers) const {
    const uint32_t* row = words + input / (32 / Bits) * outputs + output;
    const int shift = input % (32 / Bits) * Bits;
    for (int64_t i = 0; i < count; ++i) numbers[i] = (row[i] >> shift) & ((1u << Bits) - 1);
  }
};

// Words hold eight neighbouring outputs of one input, at these places.
struct Awq {
  const uint32_t* words;
  int64_t outputs;
  void operator()(int64_t input, int64_t output, int64_t count, int32_t* numbers) const {
    constexpr int shifts[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    const uint32_t* row = words + (input * outputs + output) / 8;
    for (int64_t word = 0; word < count / 8; ++word)
      for (int i = 0; i < 8; ++i) numbers[word * 8 + i] = (row[word] >> shifts[i]) & 15;
  }
};

// Calls `work` with a pointer of a dtype: 0 fp32, 1 bf16, 2 fp16.
template <class Work>
int with_output(void* out, int dtype, Work work) {
  switch (dtype) {
    case 0: work(static_cast<float*>(out)); return 0;
    case 1: work(static_cast<BFloat16*>(out)); return 0;
    case 2: work(static_cast<_Float16*>(out)); return 0;
    default: return 1;
  }
}

// Calls `work` with consecutive parts of `count` things, each in a thread. Starting one takes some ten microseconds.
template <class Work>
void in_threads(int64_t count, int threads, Work work) {
  std::vector<std::thread> others;
  const int64_t part = (count + threads - 1) / threads;
  for (int64_t begin = part; begin < count; begin += part) {
    const int64_t end = begin + part < count ? begin + part : count;
    try {
      others.emplace_back(work, begin, end);
    } catch (...) {
      work(begin, end);  // No more threads may be had.
    }
  }
  work(int64_t(0), part < count ? part : count);
  for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

// All return 0, or 1 for a kind, a layout or a dtype that they do not know: nothing is written then. `threads`: at least one.

#define BLOCK_TYPES(DO)                                                                                             \
  DO(2, Q4_0) DO(3, Q4_1) DO(6, Q5_0) DO(7, Q5_1) DO(8, Q8_0) DO(10, Q2_K) DO(11, Q3_K) DO(12, Q4_K) DO(13, Q5_K) \
  DO(14, Q6_K) DO(20, IQ4_NL) DO(23, IQ4_XS) DO(39, MXFP4)

int offload_ggml(int kind, const uint8_t* in, int64_t rows, int64_t row_blocks, int64_t head_rows, void* out, int dtype,
                 int threads) {
  switch (kind) {
#define DO(number, name)                                                           \
  case number:                                                                     \
    return with_output(out, dtype, [=](auto* to) {                                 \
      in_threads(rows, threads, [=](int64_t begin, int64_t end) {                  \
        decode_blocks<name>(in, begin, end, row_blocks, head_rows, to);            \
      });                                                                          \
    });
    BLOCK_TYPES(DO)
#undef DO
    default: return 1;
  }
}

// `kind`: 0 e4m3fn, 1 e5m2, 2 int8.
int offload_tiles(int kind, const uint8_t* in, int64_t rows, int64_t columns, const float* scales, float factor,
                  int64_t tile_rows, int64_t tile_columns, void* out, int dtype, int threads) {
  if (kind < 0 || kind > 2) return 1;
  return with_output(out, dtype, [=](auto* to) {
    in_threads(rows, threads, [=](int64_t begin, int64_t end) {
      if (kind == 0) decode_tiles<e4m3>(in, begin, end, columns, scales, factor, tile_rows, tile_columns, to);
      if (kind == 1) decode_tiles<e5m2>(in, begin, end, columns, scales, factor, tile_rows, tile_columns, to);
      if (kind == 2) decode_tiles<int8>(in, begin, end, columns, scales, factor, tile_rows, tile_columns, to);
    });
  });
}

int offload_four_bits(int, const uint8_t* in, int64_t count, int64_t block, const float* scales, const float* numbers,
                      void* out, int dtype, int threads) {
  return with_output(out, dtype, [=](auto* to) {
    in_threads((count + block - 1) / block, threads, [=](int64_t begin, int64_t end) {
      decode_four_bits(in, begin, end, count, block, scales, numbers, to);
    });
  });
}

int offload_packed_rows(int bits, const uint8_t* in, int64_t rows, int64_t columns, int64_t row_bytes, const void* scales,
                        int64_t scale_dtype, int64_t shared, const float* zeros, int64_t groups, void* out, int dtype,
                        int threads) {
  if ((bits != 4 && bits != 8) || scale_dtype < 0 || scale_dtype > 2) return 1;
  return with_output(out, dtype, [=](auto* to) {
    with_output(const_cast<void*>(scales), int(scale_dtype), [=](auto* of) {
      in_threads(rows, threads, [=](int64_t begin, int64_t end) {
        if (bits == 4) decode_packed_rows<4>(in, begin, end, columns, row_bytes, of, shared, zeros, groups, to);
        if (bits == 8) decode_packed_rows<8>(in, begin, end, columns, row_bytes, of, shared, zeros, groups, to);
      });
    });
  });
}

// `layout`: 4 or 8 bits of GPTQ, or 0 for AWQ.
int offload_packed_columns(int layout, const uint32_t* words, int64_t outputs, int64_t inputs, const float* scales,
                           const float* zeros, const int32_t* group_of, void* out, int dtype, int threads) {
  if (layout != 0 && layout != 4 && layout != 8) return 1;
  return with_output(out, dtype, [=](auto* to) {
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    in_threads(tiles, threads, [=](int64_t begin, int64_t end) {
      if (layout == 4) decode_columns(Gptq<4>{words, outputs}, begin, end, outputs, inputs, scales, zeros, group_of, to);
      if (layout == 8) decode_columns(Gptq<8>{words, outputs}, begin, end, outputs, inputs, scales, zeros, group_of, to);
      if (layout == 0) decode_columns(Awq{words, outputs}, begin, end, outputs, inputs, scales, zeros, group_of, to);
    });
  });
}

}  // extern "C"
