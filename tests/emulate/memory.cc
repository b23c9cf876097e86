/* Memory that takes its time: relaxed stores come out in any order, bulk copies as late as may be. See emulate.h. */
#include <emmintrin.h>

#include "fiber.h"

enum { LATE_MOST = 512 };

/* ---- shared memory ---- */

char *emu_poisoned(size_t bytes)
{
    bytes = (bytes + 128) / 128 * 128;
    void *memory = aligned_alloc(128, bytes);
    if (!memory)
        abort();
    return (char *)memset(memory, 0xa5, bytes);
}

void *emu_shared_at(const void *variable, size_t bytes)
{
    emu_block *b = emu_self->block;
    for (const auto &v : b->variables)
        if (v.first == variable)
            return v.second;
    b->variables.emplace_back(variable, emu_poisoned(bytes));
    return b->variables.back().second;
}

char *emu_dynamic(void)
{
    return emu_self->block->dynamic;
}

/* ---- relaxed stores ---- */

static uint64_t line_bit(const void *p)
{
    return 1ull << ((uintptr_t)p / 16 * 0x9e3779b97f4a7c15u >> 58);
}

static void perform(const emu_late *s)
{
    if (s->bytes == 16) /* whole, on every x86-64 with AVX */
        _mm_store_si128((__m128i *)s->to, _mm_load_si128((const __m128i *)s->value));
    else
        __atomic_store_n((uint64_t *)s->to, *(const uint64_t *)s->value, __ATOMIC_RELAXED);
    __asm__ volatile("" ::: "memory");
}

void emu_drain_block(emu_block *b)
{
    for (const emu_late &s : b->late)
        perform(&s);
    b->late.clear();
    b->late_lines = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void emu_drain(void)
{
    emu_drain_block(emu_self->block);
}

void emu_store(void *to, const void *value, uint32_t bytes)
{
    emu_block *b = emu_self->block;
    if ((uintptr_t)to % bytes)
        emu_die("a store that is not aligned");
    if (b->late.size() == LATE_MOST)
        emu_drain_block(b);
    emu_late s = {};
    s.to = to;
    s.bytes = bytes;
    memcpy(s.value, value, bytes);
    b->late.push_back(s);
    b->late_lines |= line_bit(to);
}

/* What this block stored there is seen by what it does there next: the order of one address is never given up. */
void emu_settle(const void *p)
{
    emu_block *b = emu_self->block;
    if (!(b->late_lines & line_bit(p)))
        return;
    size_t kept = 0;
    for (const emu_late &s : b->late) {
        if ((uintptr_t)s.to / 16 == (uintptr_t)p / 16)
            perform(&s);
        else
            b->late[kept++] = s;
    }
    b->late.resize(kept);
}

/* Random ones, but none before an older one to the same 16 bytes. */
void emu_let_some_out(emu_grid *g, emu_block *b)
{
    std::vector<emu_late> &late = b->late;
    for (size_t tries = late.size() / 4 + 1; tries && !late.empty(); tries--) {
        size_t at = emu_draw(g) % late.size();
        bool oldest = true;
        for (size_t i = 0; oldest && i < at; i++)
            oldest = (uintptr_t)late[i].to / 16 != (uintptr_t)late[at].to / 16;
        if (!oldest)
            continue;
        perform(&late[at]);
        late.erase(late.begin() + (ptrdiff_t)at);
    }
    if (late.empty())
        b->late_lines = 0;
}

/* ---- the bulk copy engine ---- */

static void aligned(const void *global, const void *shared, uint32_t bytes)
{
    if (((uintptr_t)global | (uintptr_t)shared | bytes) % 16 || bytes == 0)
        emu_die("a bulk copy that is not of whole, aligned 16 bytes");
}

static void settle_barrier(uint64_t *bar)
{
    if ((*bar & 2) && *bar >> 32 == 0)
        *bar = (*bar & 1) ^ 1;
}

void emu_expect(uint64_t *bar, uint32_t bytes)
{
    if (*bar & 2)
        emu_die("a stage is filled again before it was waited for");
    *bar += 2 + ((uint64_t)bytes << 32);
    settle_barrier(bar);
}

bool emu_try_wait(uint64_t *bar, uint32_t parity)
{
    std::vector<emu_copy> &loads = emu_self->block->loads;
    for (size_t i = 0; i < loads.size();) {
        if (loads[i].bar != bar) {
            i++;
            continue;
        }
        memcpy(loads[i].to, loads[i].from, loads[i].bytes);
        *bar -= (uint64_t)loads[i].bytes << 32;
        loads[i] = loads.back();
        loads.pop_back();
        settle_barrier(bar);
    }
    bool over = (*bar & 1) != parity;
    if (!over)
        emu_yield();
    return over;
}

void emu_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar)
{
    aligned(global, shared, bytes);
    emu_self->block->loads.push_back({shared, global, bytes, bar, {}});
}

void emu_bulk_store(void *global, const void *shared, uint32_t bytes)
{
    aligned(global, shared, bytes);
    if (emu_self->stores.empty())
        emu_self->stores.emplace_back();
    emu_self->stores.back().push_back({global, shared, bytes, nullptr, {}});
}

void emu_bulk_commit(void)
{
    if (emu_self->stores.empty())
        emu_self->stores.emplace_back();
    emu_self->stores.emplace_back();
}

/* All but so many groups have been read; they are written later. */
void emu_bulk_wait_read(size_t groups_left)
{
    std::vector<std::vector<emu_copy>> &s = emu_self->stores;
    for (size_t g = 0; g + groups_left + 1 < s.size(); g++)
        for (emu_copy &c : s[g])
            if (c.kept.empty())
                c.kept.assign((const char *)c.from, (const char *)c.from + c.bytes);
}

void emu_bulk_wait(size_t groups_left)
{
    std::vector<std::vector<emu_copy>> &s = emu_self->stores;
    while (s.size() > groups_left + 1) { /* behind the closed ones is the open one */
        for (const emu_copy &c : s.front())
            memcpy(c.to, c.kept.empty() ? c.from : c.kept.data(), c.bytes);
        s.erase(s.begin());
    }
}
