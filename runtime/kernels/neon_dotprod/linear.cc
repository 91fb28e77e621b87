// y[m, n] = Σ_b xscale[m, b] · (scale[n, b] · dot_b [+ offset[n, b] · sum_b]),  b: blocks of 32 of
// K
//
// Four rows of W × 8 K of nibbles are one register (neon/codes.h draws it): a 32-bit lane is a row.
// sdot adds four signed byte products to each lane; its second operand is one lane of a register
// of 16 K of x, so x needs no broadcast:
//     dot[r] += Σ_j w[r, j]·x[j]
//
// int4: codes 0 … 15 as they are, the sum starts at −8·Σx (zero points: −zp·Σx); where a block is
//   unpacked for many rows, codes less 8 (zero points: zp), and the sum starts at 0.
// int8: bytes as they are.
// nf4: a byte table, tbl, gives w = round(124.125·value). The rounding costs at most 0.0037 of
//   absmax a weight.
//
// Tile: 16 rows of W × 1 row of x (decode) or 4 (several rows, whose codes are unpacked once for up
// to 32).
//   sums [rows][4]   int32, up to 16 of the 32 registers; 4 hold x, 4 the codes of 8 rows × 8 K
//   acc              float; registers for one row of x, [rows, 16] in L1 for several
#include "kernels/neon/panel_rows.h"
#include "kernels/neon_dotprod/neon_dotprod.h"
#include "kernels/neon_dotprod/sdot.h"

namespace edgelora::kernels::neon_dotprod {
namespace {

struct Isa : Sdot {
  static constexpr int kTileRows = 4;

  static int32_t term_factor(Format format) { return neon_term_factor(format); }

  template <Format kFormat>
  static void panel(const PanelView& view, const RowTile& x, float* acc) {
    panel_of_rows<Isa, kFormat>(view, x, acc);
  }
};

}  // namespace

void linear(const Weights& weights, const Activations& x, int64_t panel_begin, int64_t panel_end,
            float* y, int64_t y_stride, void* scratch) {
  drive_linear<Isa>(weights, x, panel_begin, panel_end, y, y_stride, scratch);
}

}  // namespace edgelora::kernels::neon_dotprod
