/* The arithmetic of rails that kernels share with C (algo/rail_wire.h), against the CPU's own and against counting. */
#include "algo/rail_wire.h"

#include "algo/ht/cpu/rail.h"
#include "common/check.h"

static uint8_t ring[8u << 20];

/* Rings are cut as the CPU cuts them, and a record lies where the CPU puts it. */
static void cut_as_the_cpu(size_t ring_bytes, size_t stride)
{
    epx__rails_t rails = {.layout = {.ring_bytes = ring_bytes}};
    epx__ht_rails_t ht = {.rails = &rails, .domains = 2};
    epx__rail_stream_t stream;
    epx__rail_cut_t cut;
    bool fits = epx__rail_stream_init(&ht, &stream, stride, 1000, 0) == EPX_OK;
    CHECK(epx__rail_cut_make(ring_bytes, stride, &cut) == fits);
    if (!fits || stride == 0)
        return;
    CHECK(cut.stride == stream.stride && cut.rows_per_chunk == stream.rows_per_chunk && cut.slots == stream.slots);
    CHECK((size_t)cut.slots * cut.rows_per_chunk * stride <= ring_bytes);
    for (uint32_t k = 0; k < 1000; k += 7)
        CHECK(epx__rail_at(&cut, k) == (size_t)(epx__rail_row(ring, &stream, k) - ring));
}

/* Chunks: what is sent, what has come, what may be given back. */
static void chunks(const epx__rail_cut_t *cut, uint32_t total)
{
    uint32_t sent = 0, whole = 0;
    for (uint32_t row = 0; row < total; row++)
        sent += row % cut->rows_per_chunk == 0;
    CHECK(epx__rail_chunks(cut, total) == sent);
    for (uint32_t rows = 0; rows <= total; rows++) {
        whole += rows > 0 && (rows % cut->rows_per_chunk == 0 || rows == total);
        CHECK(epx__rail_whole_chunks(cut, rows, total) == whole);
    }
    for (uint32_t n = 0; n <= sent; n++) {
        uint32_t come = epx__rail_come(cut, n, total);
        CHECK(come <= total && epx__rail_whole_chunks(cut, come, total) == n);
    }
}

/* So many consecutive records never lie in more chunks than the ring has slots, wherever they begin; one more may. */
static void together(const epx__rail_cut_t *cut)
{
    uint32_t n = epx__rail_together(cut), most = 0;
    for (uint32_t from = 0; from < 3 * cut->rows_per_chunk; from++) {
        uint32_t spans = (from + n - 1) / cut->rows_per_chunk - from / cut->rows_per_chunk + 1;
        CHECK(n >= 1 && spans <= cut->slots);
        spans = (from + n) / cut->rows_per_chunk - from / cut->rows_per_chunk + 1;
        most = spans > most ? spans : most;
    }
    CHECK(most == cut->slots + 1);
}

/* A stream of which some rows are mine, in several hands: what is told as needless names no row that is not out. */
static void hands(uint32_t hands, uint32_t every, uint32_t total)
{
    int32_t list[256];
    uint32_t mine = 0, done[8] = {0};
    for (uint32_t k = 0; k < total; k++)
        if (k % every == every / 2)
            list[mine++] = (int32_t)k;
    for (uint32_t turn = 0; turn <= mine; turn++) {
        uint32_t next = UINT32_MAX, out = 0;
        for (uint32_t h = 0; h < hands; h++) {
            uint32_t undone = epx__rail_undone(h, hands, done[h]);
            next = undone < next ? undone : next;
        }
        while (out < mine && out < next)
            out++;
        for (uint32_t come = 0; come <= total; come += 3) {
            uint32_t needless = epx__rail_needless(list, mine, next, come);
            CHECK(needless <= come && (next >= mine || needless <= (uint32_t)list[next]));
            CHECK(next < mine || needless == come);
        }
        uint32_t h = (turn * 5 + 1) % hands; /* any order of hands */
        for (uint32_t i = 0; i < hands && epx__rail_undone(h, hands, done[h]) >= mine; i++)
            h = (h + 1) % hands;
        done[h]++;
    }
    for (uint32_t value = 0; value <= total; value++) {
        uint32_t below = 0;
        for (uint32_t i = 0; i < mine; i++)
            below += (uint32_t)list[i] < value;
        CHECK(epx__rail_below(list, mine, (int32_t)value) == below);
    }
}

int main(void)
{
    static const size_t rings[] = {65536, 69632, 1u << 20, 8u << 20};
    static const size_t strides[] = {0, 16, 64, 272, 1024, 4112, 14336, 16384, 24592, 40000, 65536, 65552};
    for (size_t r = 0; r < sizeof rings / sizeof *rings; r++)
        for (size_t s = 0; s < sizeof strides / sizeof *strides; s++)
            cut_as_the_cpu(rings[r], strides[s]);
    for (uint32_t rows = 1; rows < 9; rows++)
        for (uint32_t slots = 1; slots < 5; slots++) {
            epx__rail_cut_t cut = {16, rows, slots};
            together(&cut);
            for (uint32_t total = 0; total < 30; total++)
                chunks(&cut, total);
        }
    for (uint32_t n = 1; n <= 8; n++)
        for (uint32_t every = 1; every < 6; every++)
            hands(n, every, 200);
    return check_done();
}
