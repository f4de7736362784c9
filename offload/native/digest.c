// The digest of offload/digest.py over whole rows of words, with the same result, from one pass through memory.
// Plain C ABI.

#include <stdint.h>

#define LANES 32 // as many sums at once as hide the latency of a product, for vectors of any width
#define AHEAD 512 // words that are asked of memory early: a third faster on data that no cache has

// Returns the sum of every row's combination with the multipliers, each times an odd number of its own.
// row_words is a multiple of LANES.
uint64_t tier_digest(const uint64_t *words, const uint64_t *multipliers, uint64_t num_rows, uint64_t row_words) {
    const uint64_t golden = 0x9E3779B97F4A7C15; // _GOLDEN
    uint64_t total = 0;
    for (uint64_t row = 0; row < num_rows; row++, words += row_words) {
        uint64_t sums[LANES] = {0}, sum = 0;
        for (uint64_t word = 0; word < row_words; word += LANES) {
            for (int line = 0; line < LANES; line += 8) __builtin_prefetch(words + word + AHEAD + line);
            for (int lane = 0; lane < LANES; lane++) sums[lane] += words[word + lane] * multipliers[word + lane];
        }
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        total += sum * (2 * golden * (row + 1) + 1);
    }
    return total;
}
