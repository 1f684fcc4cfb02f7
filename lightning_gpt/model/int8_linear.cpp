// y = x W^T + b with int8 weights, one scale a row of W; inputs and sums are in float32.
//
// Shapes   B rows · K input channels, a multiple of DEPTH · N output channels · J blocks of WIDTH of them
//          w (J, K, WIDTH) · scales, bias (N) · x (B, K) · y (B, N)

#include <cstdint>

constexpr int64_t WIDTH = 64;  // sums of a block: eight registers of AVX2
constexpr int64_t DEPTH = 8;   // inputs whose products are added before a sum goes back to memory

extern "C" void int8_linear(const int8_t* w, const float* scales, const float* bias, const float* x, float* y,
                            int64_t B, int64_t K, int64_t N) {
    #pragma omp parallel for
    for (int64_t n = 0; n < N; n += WIDTH) {
        for (int64_t b = 0; b < B; b++) {
            float sums[WIDTH] = {};
            for (int64_t k = 0; k < K; k += DEPTH) {
                const int8_t* weights = w + n * K + k * WIDTH;
                const float* inputs = x + b * K + k;
                for (int64_t j = 0; j < WIDTH; j++) {  // the compiler vectorizes this loop and unrolls the next
                    float sum = sums[j];
                    for (int64_t i = 0; i < DEPTH; i++) sum += inputs[i] * weights[i * WIDTH + j];
                    sums[j] = sum;
                }
            }
            for (int64_t j = 0; j < WIDTH && n + j < N; j++) y[b * N + n + j] = sums[j] * scales[n + j] + bias[n + j];
        }
    }
}
