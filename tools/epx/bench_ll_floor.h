/* The lists of low latency's floor (bench_ll_floor.c says what they are for): which row goes where. */
#ifndef EPX_TOOL_BENCH_LL_FLOOR_H
#define EPX_TOOL_BENCH_LL_FLOOR_H

#include "bench_ll.h"

/* A list for a floor of mem.h: where each item's rows go, or come from. */
typedef struct ll_part {
    floor_kind_t kind;
    uint32_t items, slots;       /* rows to copy, or sums; places of each */
    int32_t *dst_rank, *dst_row; /* [items][slots], ended by -1 */
    uint8_t **area;              /* by dst_rank; CPU */
    uint8_t **out;               /* CPU: [items] where each sum goes, or NULL */
    uint32_t *rows;              /* of each rank's area; GPU */
    void *floor;                 /* NULL: nothing to do */
} ll_part_t;

/* Each fills in a part; non-zero without memory. `pieces`: that each row is cut into. */

/* Each token's row once to every rank that wants it. */
int ll_part_copies(ll_part_t *part, const bench_ll_t *ll, size_t pieces);
/* What came, an item a row: the places with this rank's experts where it goes (FLOOR_DISPATCH), or whose outputs are
 * added (FLOOR_COMBINE). */
int ll_part_places(ll_part_t *part, const bench_ll_t *ll, floor_kind_t kind);
/* Where outputs go back to: a row for each choice or, reduced, one for all of this rank's. */
int ll_part_push(ll_part_t *part, const bench_ll_t *ll, size_t pieces);
/* CPU, pre-reduced: sums of this rank's outputs, each straight to where it goes back. */
int ll_part_reduced_push(ll_part_t *part, const bench_ll_t *ll, uint8_t *const *back_area);
/* What came back, an item for each own token. */
int ll_part_sum(ll_part_t *part, const bench_ll_t *ll);
void ll_part_fini(ll_part_t *part); /* not the floor */

#endif
