/* The CPU's floors; see floor_plan_t in mem.h. */
#ifndef EPX_TOOL_FLOOR_H
#define EPX_TOOL_FLOOR_H

#include "mem.h"

const char *floor_cpu_open(const floor_plan_t *plan, void **floor); /* NULL, or words (static) */
int floor_cpu_variants(void *floor, floor_kind_t kind);
const char *floor_cpu_variant_name(void *floor, floor_kind_t kind, int variant);
int floor_cpu_run(void *floor, floor_kind_t kind, int variant);
void floor_cpu_close(void *floor);

#endif
