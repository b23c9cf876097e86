/* Which network a spec names, and the checks that every network's put begins with. */
#include "net/net.h"

#include <stdlib.h>
#include <string.h>

#include "base/fail.h"

/* "name" or "name:argument"; *argument NULL when there is none. */
static bool spec_is(const char *spec, const char *name, const char **argument)
{
    size_t length = strlen(name);
    if (strncmp(spec, name, length) != 0 || (spec[length] != 0 && spec[length] != ':'))
        return false;
    *argument = spec[length] == ':' && spec[length + 1] != 0 ? spec + length + 1 : NULL;
    return true;
}

static epx_status_t spec_parse(const char *spec, int *which, const char **argument)
{
    if (!spec || !spec[0])
        spec = "ofi";
    if (spec_is(spec, "ofi", argument)) {
        *which = 0;
        return EPX_OK;
    }
    if (spec_is(spec, "loop", argument)) {
        *which = 1;
        if (*argument)
            return epx__fail(EPX_E_INVALID, "network \"%s\": loop takes nothing after the colon", spec);
        return EPX_OK;
    }
    if (spec_is(spec, "sim", argument)) {
        *which = 2;
        char *end = NULL;
        if (*argument && (strtoull(*argument, &end, 10), *end != 0))
            return epx__fail(EPX_E_INVALID, "network \"%s\": a number (the seed) must follow \"sim:\"", spec);
        return EPX_OK;
    }
    return epx__fail(EPX_E_INVALID, "network \"%s\" is unknown; there are ofi, ofi:PROVIDER, loop, sim and sim:SEED",
                     spec);
}

epx_status_t epx__net_check_spec(const char *spec)
{
    int which;
    const char *argument;
    return spec_parse(spec, &which, &argument);
}

epx_status_t epx__net_open(const char *spec, const epx__net_config_t *config, epx__net_t **net)
{
    int which = 0;
    epx__net_config_t filled = *config;
    EPX__TRY(spec_parse(spec, &which, &filled.argument));
    if (filled.peers_max == 0 || filled.puts_max == 0 || filled.notices_max == 0)
        return epx__fail(EPX_E_INVALID, "network endpoint: peers_max, puts_max and notices_max must be at least 1");
    const epx__net_ops_t *ops = which == 1 ? &epx__net_loop : &epx__net_sim;
    if (which == 0)
        EPX__TRY(epx__net_plugin_ofi(&ops));
    return ops->open(&filled, net);
}

void epx__net_close(epx__net_t *net)
{
    if (net)
        net->ops->close(net);
}

epx_status_t epx__net_put_check(const epx__net_put_t *put, size_t local_bytes)
{
    if (put->bytes == 0) {
        if (!put->with_notice)
            return epx__fail(EPX_E_INVALID, "put: no bytes and no notice: nothing to do");
        return EPX_OK;
    }
    if (!put->memory || !put->to)
        return epx__fail(EPX_E_INVALID, "put of %zu bytes: source or destination memory is missing", put->bytes);
    if (put->offset > local_bytes || put->bytes > local_bytes - put->offset)
        return epx__fail(EPX_E_INVALID, "put: source bytes [%zu, +%zu) leave the registered %zu", put->offset,
                         put->bytes, local_bytes);
    if (put->to_offset > put->to->bytes || put->bytes > put->to->bytes - put->to_offset)
        return epx__fail(EPX_E_INVALID, "put: destination bytes [%zu, +%zu) leave the peer's registered %llu",
                         put->to_offset, put->bytes, (unsigned long long)put->to->bytes);
    return EPX_OK;
}
