/* The table of environment variables, and the one place that reads them. */
#include "base/env.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fail.h"

static const epx__env_info_t table[EPX__ENV_COUNT] = {
#define INFO(name, default_text, meaning) {"EPX_" #name, default_text, meaning},
    EPX__ENV_MAP(INFO)
#undef INFO
};

const epx__env_info_t *epx__env_info(epx__env_t variable)
{
    return (unsigned)variable < EPX__ENV_COUNT ? &table[variable] : NULL;
}

const char *epx__env_value(epx__env_t variable)
{
    const epx__env_info_t *info = epx__env_info(variable);
    const char *value = info ? getenv(info->name) : NULL;
    return value && value[0] ? value : NULL;
}

const char *epx__env_text(epx__env_t variable)
{
    const char *value = epx__env_value(variable);
    const epx__env_info_t *info = epx__env_info(variable);
    if (value || !info)
        return value;
    return info->default_text[0] ? info->default_text : NULL;
}

/* Decimal digits alone; strtoull would take signs, blanks and wrap. */
static int parse_u64(const char *text, uint64_t *out)
{
    uint64_t value = 0;
    if (!text[0])
        return 0;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return 0;
        uint64_t digit = (uint64_t)(*text - '0');
        if (value > (UINT64_MAX - digit) / 10)
            return 0;
        value = value * 10 + digit;
    }
    *out = value;
    return 1;
}

epx_status_t epx__env_u64(epx__env_t variable, uint64_t low, uint64_t high, uint64_t fallback, uint64_t *out)
{
    const epx__env_info_t *info = epx__env_info(variable);
    if (!info)
        return epx__fail(EPX_E_INVALID, "environment variable number %d does not exist", (int)variable);
    const char *text = epx__env_text(variable);
    uint64_t value = fallback;
    if (text && (!parse_u64(text, &value) || value < low || value > high))
        return epx__fail(EPX_E_INVALID, "%s is \"%.64s\"; it must be a whole number from %llu to %llu", info->name,
                         text, (unsigned long long)low, (unsigned long long)high);
    *out = value;
    return EPX_OK;
}

epx_status_t epx__env_choice(epx__env_t variable, const char *const *words, int *out)
{
    const char *text = epx__env_text(variable);
    char right[96] = "";
    size_t at = 0;
    for (int i = 0; words[i]; i++) {
        if (text && !strcmp(text, words[i])) {
            *out = i;
            return EPX_OK;
        }
        if (at < sizeof right)
            at += (size_t)snprintf(right + at, sizeof right - at, "%s%s",
                                   !i             ? ""
                                   : words[i + 1] ? ", "
                                                  : " or ",
                                   words[i]);
    }
    const epx__env_info_t *info = epx__env_info(variable);
    return epx__fail(EPX_E_INVALID, "%s is \"%.64s\"; it must be %s", info ? info->name : "?", text ? text : "", right);
}
