// The passes of csrc/cpu.cpp over raw pointers. This file includes nothing: what it defines is compiled for AVX2, and a
// function of another header may not be.

constexpr int kBytes = 32;  // of a vector

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  static constexpr int count = kBytes / sizeof(T);
};

template <typename T>
struct One {
  typedef T type;
  static constexpr int count = 1;
};

template <typename T>
inline typename Lanes<T>::type& lanes_at(T* pointer) {
  return *reinterpret_cast<typename Lanes<T>::type*>(pointer);
}

template <typename T>
inline const typename Lanes<T>::type& lanes_at(const T* pointer) {
  return *reinterpret_cast<const typename Lanes<T>::type*>(pointer);
}

template <typename T>
inline T sum_of_lanes(const typename Lanes<T>::type& vector) {
  T sum = 0;
  for (int lane = 0; lane < Lanes<T>::count; ++lane) sum += vector[lane];
  return sum;
}

// Rows `n` to `n + kRows` of W_eff in `kVectors` vectors (`Lanes`, or `One` element) of columns from `k` on.
template <typename T, template <typename> class V, int kRows, int kVectors>
inline void effective_tile(const Weight<T>& work, int64_t n, int64_t k) {
  typedef typename V<T>::type Vector;
  constexpr int step = V<T>::count;
  const auto vector = [](const T* pointer) -> const Vector& { return *reinterpret_cast<const Vector*>(pointer); };
  Vector tile[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) tile[i][j] = Vector{} + (work.row_scale ? work.row_scale[n + i] : T(1));
  if (work.column_scale)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) tile[i][j] = vector(work.column_scale + k + j * step);
  const auto add = [&](const Factors<T>& factors) {
    for (int64_t r = 0; r < factors.rank; ++r)
      for (int j = 0; j < kVectors; ++j) {
        const Vector up = vector(factors.up + r * factors.up_row + k + j * step);
        for (int i = 0; i < kRows; ++i) tile[i][j] += up * factors.down[(n + i) * factors.down_row + r];
      }
  };
  add(work.scale);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      tile[i][j] *= vector(work.weight + (n + i) * work.weight_row + k + j * step);
      if (work.row_shift) tile[i][j] += work.row_shift[n + i];
    }
  add(work.shift);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j)
      *reinterpret_cast<Vector*>(work.result + (n + i) * work.columns + k + j * step) = tile[i][j];
}

template <typename T, int kRows>
inline void effective_tiles(const Weight<T>& work, int64_t n) {
  constexpr int kVectors = 2, lanes = Lanes<T>::count;
  int64_t k = 0;
  for (; k + kVectors * lanes <= work.columns; k += kVectors * lanes)
    effective_tile<T, Lanes, kRows, kVectors>(work, n, k);
  for (; k < work.columns; ++k) effective_tile<T, One, kRows, 1>(work, n, k);
}

// Rows `begin` to `end` of W_eff.
template <typename T>
void effective_rows(const Weight<T>& work, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kTileRows <= end; n += kTileRows) effective_tiles<T, kTileRows>(work, n);
  for (; n < end; ++n) effective_tiles<T, 1>(work, n);
}

// Adds to `sums`, of `count` columns, the sum of `part(i, k)` over kTokens tokens i; k: a vector (`Lanes`, or `One` element).
template <typename T, int kTokens, typename Part>
inline void add_tokens(T* sums, int64_t count, const Part& part) {
  const auto add = [&](auto vectors, int64_t begin, int64_t end) {
    typedef typename decltype(vectors)::type Vector;
    for (int64_t k = begin; k < end; k += decltype(vectors)::count) {
      Vector sum = part(vectors, 0, k);
      for (int i = 1; i < kTokens; ++i) sum += part(vectors, i, k);
      *reinterpret_cast<Vector*>(sums + k) += sum;
    }
  };
  const int64_t whole = count - count % Lanes<T>::count;
  add(Lanes<T>(), 0, whole);
  add(One<T>(), whole, count);
}

// What `kTokens` tokens from `m` on add to the sums of `count` columns from `n` on, in `sums`: a row for each of
// contracted, then db, then dots.
template <typename T, int kTokens>
inline void add_sums(const Tokens<T>& work, int64_t m, int64_t n, int64_t count, T* sums, int64_t sums_row) {
  const T* dy = work.dy + m * work.dy_row + n;
  const auto vector = [](auto vectors, const T* pointer) {
    return *reinterpret_cast<const typename decltype(vectors)::type*>(pointer);
  };
  const auto gradient = [&](auto vectors, int i, int64_t k) { return vector(vectors, dy + i * work.dy_row + k); };
  for (int64_t r = 0; r < work.token_rank; ++r, sums += sums_row) {
    const T* weights = work.tokens + r * work.tokens_row + m;
    add_tokens<T, kTokens>(sums, count, [&](auto vectors, int i, int64_t k) {
      return gradient(vectors, i, k) * weights[i];
    });
  }
  if (work.sums) add_tokens<T, kTokens>(sums, count, gradient);
  sums += sums_row;
  if (!work.output) return;
  const T* y = work.output + m * work.output_row + n;
  add_tokens<T, kTokens>(sums, count, [&](auto vectors, int i, int64_t k) {
    return gradient(vectors, i, k) * vector(vectors, y + i * work.output_row + k);
  });
}

// What columns `n` to `n + count` add to `through`, of `kTokens` tokens and `kRanks` ranks.
template <typename T, int kTokens, int kRanks>
inline void add_through(const Tokens<T>& work, int64_t m, int64_t n, int64_t count, int64_t r, T* through) {
  constexpr int lanes = Lanes<T>::count;
  typename Lanes<T>::type sums[kRanks][kTokens] = {};
  T rest[kRanks][kTokens] = {};
  const T* dy = work.dy + m * work.dy_row + n;
  const T* rows = work.rows + r * work.rows_row + n;
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes)
    for (int j = 0; j < kRanks; ++j)
      for (int i = 0; i < kTokens; ++i)
        sums[j][i] += lanes_at(dy + i * work.dy_row + k) * lanes_at(rows + j * work.rows_row + k);
  for (; k < count; ++k)
    for (int j = 0; j < kRanks; ++j)
      for (int i = 0; i < kTokens; ++i) rest[j][i] += dy[i * work.dy_row + k] * rows[j * work.rows_row + k];
  for (int j = 0; j < kRanks; ++j)
    for (int i = 0; i < kTokens; ++i)
      through[(r + j) * work.count + m + i] += sum_of_lanes<T>(sums[j][i]) + rest[j][i];
}

template <typename T, int kTokens>
inline void read_panel(const Tokens<T>& work, int64_t m, int64_t n, int64_t count, T* sums, int64_t sums_row,
                       T* through) {
  add_sums<T, kTokens>(work, m, n, count, sums, sums_row);
  int64_t r = 0;
  for (; r + 2 <= work.row_rank; r += 2) add_through<T, kTokens, 2>(work, m, n, count, r, through);
  for (; r < work.row_rank; ++r) add_through<T, kTokens, 1>(work, m, n, count, r, through);
}

// Columns `begin` to `end` of every sum over tokens, and their part of `through`. `parts` has as many rows as there are
// sums, of `end - begin` elements, and is zero: sums of a block of tokens are formed there and then added to the whole, so
// that rounding errors grow with the length of a block and the number of blocks, and not with the number of tokens.
template <typename T>
void read_columns(const Tokens<T>& work, int64_t begin, int64_t end, T* parts, T* through) {
  constexpr int kTokens = 4;
  constexpr int64_t kBlock = 256, kPanel = 512;
  const int64_t width = end - begin, sums = work.token_rank + 2;
  for (int64_t first = 0; first < work.count; first += kBlock) {
    const int64_t last = first + kBlock < work.count ? first + kBlock : work.count;
    int64_t m = first;
    for (; m + kTokens <= last; m += kTokens)
      for (int64_t n = 0; n < width; n += kPanel)
        read_panel<T, kTokens>(work, m, begin + n, n + kPanel < width ? kPanel : width - n, parts + n, width, through);
    for (; m < last; ++m)
      for (int64_t n = 0; n < width; n += kPanel)
        read_panel<T, 1>(work, m, begin + n, n + kPanel < width ? kPanel : width - n, parts + n, width, through);
    for (int64_t i = 0; i < sums; ++i)
      for (int64_t k = 0; k < width; ++k) {
        work.totals[i * work.columns + begin + k] += parts[i * width + k];
        parts[i * width + k] = 0;
      }
  }
}
