// Sites and neighbour tables of a mask on a CPU: what maps.py and sites.py do in torch, in single passes over the grid.
//
// A grid is [batch, height + 2, width + 2] int32: the row of a site's features, n where there is none, one empty pixel
// all round. Sites are in memory order. Taps are k = kh + 3 * kw.

#include <stdint.h>
#include <string.h>

int64_t sr_count(const uint8_t *mask, int64_t pixels) {
    int64_t n = 0;
    for (int64_t i = 0; i < pixels; i++) n += mask[i] != 0;
    return n;
}

// The n set pixels of mask [batch, height, width]: sites [n, 3], their flat positions [n], and the grid.
void sr_sites(
    const uint8_t *mask, int64_t batch, int64_t height, int64_t width, int64_t n, int64_t *sites, int64_t *flat,
    int32_t *grid
) {
    int64_t cells = batch * (height + 2) * (width + 2), row = 0;
    for (int64_t i = 0; i < cells; i++) grid[i] = (int32_t)n;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t y = 0; y < height; y++) {
            const int64_t start = (b * height + y) * width;
            int32_t *cell = grid + (b * (height + 2) + y + 1) * (width + 2) + 1;
            for (int64_t x = 0; x < width; x++) {
                if (width - x >= 8) {  // most of a mask is empty
                    uint64_t eight;
                    memcpy(&eight, mask + start + x, 8);
                    if (!eight) {
                        x += 7;
                        continue;
                    }
                }
                if (!mask[start + x]) continue;
                int64_t *site = sites + 3 * row;
                site[0] = b;
                site[1] = y;
                site[2] = x;
                flat[row] = start + x;
                cell[x] = (int32_t)row++;
            }
        }
}

// The nine neighbours of every site on its own level, [n, 9].
void sr_neighbours(const int32_t *grid, int64_t height, int64_t width, const int64_t *sites, int64_t n, int32_t *table) {
    const int64_t line = width + 2;
    for (int64_t i = 0; i < n; i++, sites += 3, table += 9) {
        const int32_t *corner = grid + (sites[0] * (height + 2) + sites[1]) * line + sites[2];
        for (int kw = 0; kw < 3; kw++)
            for (int kh = 0; kh < 3; kh++) table[kh + 3 * kw] = corner[kh * line + kw];
    }
}

// Whether a site is the first of the sites of its 2x2 block, whose corner is even.
static inline int is_first(const int32_t *grid, int64_t height, int64_t width, const int64_t *site, int32_t none) {
    const int64_t line = width + 2;
    const int32_t *at = grid + (site[0] * (height + 2) + site[1] + 1) * line + site[2] + 1;
    const int right = (int)(site[2] & 1);
    if (right && at[-1] != none) return 0;
    return !(site[1] & 1) || (at[-line - right] == none && at[-line - right + 1] == none);
}

int64_t sr_count_blocks(const int32_t *grid, int64_t height, int64_t width, const int64_t *sites, int64_t n) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < n; i++) blocks += is_first(grid, height, width, sites + 3 * i, (int32_t)n);
    return blocks;
}

// The 4x4 patches around the blocks with a site, row by row, [blocks, 16]; the block is the patch's middle.
void sr_patches(
    const int32_t *grid, int64_t height, int64_t width, const int64_t *sites, int64_t n, int32_t *patches
) {
    const int64_t line = width + 2;
    for (int64_t i = 0; i < n; i++, sites += 3) {
        if (!is_first(grid, height, width, sites, (int32_t)n)) continue;
        const int64_t y = sites[1] & ~1, x = sites[2] & ~1;  // an odd side ends within a block, its border within a patch
        const int rows = y + 4 > height + 2 ? 3 : 4, columns = x + 4 > line ? 3 : 4;
        const int32_t *corner = grid + (sites[0] * (height + 2) + y) * line + x;
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++) *patches++ = r < rows && c < columns ? corner[r * line + c] : (int32_t)n;
    }
}

// Which coarse pixels a 3x3 convolution with stride 2 reaches: see coarse_mask in sites.py.
void sr_coarse(
    const int64_t *sites, int64_t n, int64_t padding, int64_t batch, int64_t height, int64_t width, uint8_t *coarse
) {
    if (height < 1 || width < 1) return;  // nothing there, not even an address
    memset(coarse, 0, batch * height * width);
    if (padding) {
        for (int64_t i = 0; i < n; i++, sites += 3)
            coarse[(sites[0] * height + sites[1] / 2) * width + sites[2] / 2] = 1;
        return;
    }
    int64_t last_row = -2, last_column = -2;  // the largest coordinate of the batch bounds the coarse one
    for (int64_t i = 0; i < n; i++) {
        if (sites[3 * i + 1] > last_row) last_row = sites[3 * i + 1];
        if (sites[3 * i + 2] > last_column) last_column = sites[3 * i + 2];
    }
    last_row = last_row < 2 ? -1 + (last_row == 2) : (last_row - 2) / 2;
    last_column = last_column < 2 ? -1 + (last_column == 2) : (last_column - 2) / 2;
    if (last_row >= height) last_row = height - 1;
    if (last_column >= width) last_column = width - 1;
    for (int64_t i = 0; i < n; i++, sites += 3) {
        // The windows {2o .. 2o + 2} that hold i: o = i / 2, and i / 2 - 1 for an even i.
        int64_t y1 = sites[1] / 2, y0 = y1 - (sites[1] % 2 == 0), x1 = sites[2] / 2, x0 = x1 - (sites[2] % 2 == 0);
        for (int64_t y = y0 < 0 ? 0 : y0; y <= y1 && y <= last_row; y++)
            for (int64_t x = x0 < 0 ? 0 : x0; x <= x1 && x <= last_column; x++)
                coarse[(sites[0] * height + y) * width + x] = 1;
    }
}

// The fine rows under every coarse site's window, [n, 9]; height and width are the fine level's.
void sr_windows(
    const int32_t *fine_grid, int64_t height, int64_t width, const int64_t *sites, int64_t n, int64_t padding,
    int32_t *table
) {
    const int64_t line = width + 2;
    for (int64_t i = 0; i < n; i++, sites += 3, table += 9) {
        const int32_t *corner =
            fine_grid + (sites[0] * (height + 2) + 2 * sites[1] + 1 - padding) * line + 2 * sites[2] + 1 - padding;
        for (int kw = 0; kw < 3; kw++)
            for (int kh = 0; kh < 3; kh++) table[kh + 3 * kw] = corner[kh * line + kw];
    }
}

// How many fine sites there are of each parity of (row, column) + padding: counts[2 * row parity + column parity].
void sr_parities(const int64_t *sites, int64_t n, int64_t padding, int64_t *counts) {
    memset(counts, 0, 4 * sizeof *counts);
    for (int64_t i = 0; i < n; i++, sites += 3) counts[((sites[1] + padding) & 1) * 2 + ((sites[2] + padding) & 1)]++;
}

// For each parity its fine rows, and the coarse rows over each: tables [count, taps], taps (kh, kw) with kh first among
// 0 and 2 for an even row, 1 for an odd one, likewise columns. height and width are the coarse level's.
void sr_above(
    const int32_t *coarse_grid, int64_t height, int64_t width, const int64_t *sites, int64_t n, int64_t padding,
    int64_t *const rows[4], int32_t *const tables[4]
) {
    const int64_t line = width + 2;
    int64_t filled[4] = {0};
    for (int64_t i = 0; i < n; i++, sites += 3) {
        const int64_t y = sites[1] + padding, x = sites[2] + padding;
        const int down = (int)(y & 1), right = (int)(x & 1), group = 2 * down + right;
        const int taps_y = 2 - down, taps_x = 2 - right;
        const int32_t *at = coarse_grid + (sites[0] * (height + 2) + y / 2 + 1) * line + x / 2 + 1;
        int32_t *table = tables[group] + filled[group] * taps_y * taps_x;
        for (int kw = 0; kw < taps_x; kw++)
            for (int kh = 0; kh < taps_y; kh++) *table++ = at[-kh * line - kw];
        rows[group][filled[group]++] = i;
    }
}
