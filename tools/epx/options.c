/* The table-driven option parser. */
#include "options.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int options_refuse(const char *command, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "epx%s%s: ", command[0] ? " " : "", command);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    return 2;
}

/* Index of word[0..length) among the comma-separated choices, or -1. */
static int choice_index(const char *choices, const char *word, size_t length)
{
    int index = 0;
    for (const char *at = choices; *at; index++) {
        size_t span = strcspn(at, ",");
        if (span == length && memcmp(at, word, length) == 0)
            return index;
        at += span + (at[span] == ',');
    }
    return -1;
}

static int set_number(const option_set_t *set, const option_t *option, const char *value)
{
    char *end = NULL;
    errno = 0;
    long number = strtol(value, &end, 10);
    if (value[0] == '\0' || *end || errno || number < option->least || number > option->most)
        return options_refuse(set->command, "%s \"%s\": a whole number from %ld to %ld is needed", option->name, value,
                              option->least, option->most);
    *(long *)option->target = number;
    return 0;
}

static int set_list(const option_set_t *set, const option_t *option, const char *value)
{
    option_list_t *list = option->target;
    list->count = 0;
    for (const char *at = value;;) {
        size_t span = strcspn(at, ",");
        int index = choice_index(option->choices, at, span);
        if (index < 0)
            return options_refuse(set->command, "%s \"%.*s\": one or more of %s is needed", option->name, (int)span, at,
                                  option->choices);
        if (list->count == OPTION_LIST_MAX)
            return options_refuse(set->command, "%s takes at most %d words", option->name, OPTION_LIST_MAX);
        list->item[list->count++] = index;
        if (at[span] == '\0')
            return 0;
        at += span + 1;
    }
}

static int set_value(const option_set_t *set, const option_t *option, const char *value)
{
    switch (option->kind) {
    case OPTION_FLAG:
        *(bool *)option->target = true;
        return 0;
    case OPTION_NUMBER:
        return set_number(set, option, value);
    case OPTION_TEXT:
        if (value[0] == '\0')
            return options_refuse(set->command, "%s is empty: %s is needed", option->name, option->argument);
        *(const char **)option->target = value;
        return 0;
    case OPTION_CHOICE: {
        int index = choice_index(option->choices, value, strlen(value));
        if (index < 0)
            return options_refuse(set->command, "%s \"%s\": one of %s is needed", option->name, value, option->choices);
        *(int *)option->target = index;
        return 0;
    }
    case OPTION_LIST:
        return set_list(set, option, value);
    }
    return 2;
}

/* The option that shares the longest beginning with `word`, for the refusal. */
static const char *nearest(const option_set_t *set, const char *word)
{
    const char *best = NULL;
    size_t most = 3; /* two dashes and a letter say nothing */
    for (int i = 0; i < set->count; i++) {
        size_t same = 0;
        while (word[same] && word[same] == set->options[i].name[same])
            same++;
        if (same > most) {
            most = same;
            best = set->options[i].name;
        }
    }
    return best;
}

static int refuse_unknown(const option_set_t *set, const char *word, size_t length)
{
    const char *other = nearest(set, word);
    return options_refuse(set->command, "%.*s is no option here; %s%s`epx %s --help` lists them", (int)length, word,
                          other ? other : "", other ? "? " : "", set->command);
}

options_result_t options_parse(const option_set_t *set, int argc, char **argv, const char **positional)
{
    int positionals = 0;
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
            options_help(set);
            return OPTIONS_HELPED;
        }
        if (word[0] != '-' || word[1] == '\0') {
            if (!set->positional || positionals == 1)
                return options_refuse(set->command,
                                      "\"%s\" is one argument too many; `epx %s --help` lists what it takes", word,
                                      set->command);
            positionals++;
            *positional = word;
            continue;
        }
        size_t length = strcspn(word, "=");
        const option_t *option = NULL;
        for (int j = 0; j < set->count && !option; j++)
            if (strlen(set->options[j].name) == length && memcmp(set->options[j].name, word, length) == 0)
                option = &set->options[j];
        if (!option)
            return refuse_unknown(set, word, length);
        const char *value = word[length] == '=' ? word + length + 1 : NULL;
        if (option->kind == OPTION_FLAG && value)
            return options_refuse(set->command, "%s takes no value: leave \"=%s\" out", option->name, value);
        if (option->kind != OPTION_FLAG && !value) {
            if (i + 1 == argc)
                return options_refuse(set->command, "%s needs a value: %s %s", option->name, option->name,
                                      option->argument);
            value = argv[++i];
        }
        if (set_value(set, option, value))
            return OPTIONS_WRONG;
    }
    return OPTIONS_GO;
}

void options_help(const option_set_t *set)
{
    printf("usage: epx %s [options]%s%s%s\n\n%s\n", set->command, set->positional ? " [" : "",
           set->positional ? set->positional : "", set->positional ? "]" : "", set->about);
    if (set->positional)
        printf("\n  %-26s %s\n", set->positional, set->positional_help);
    if (set->count)
        printf("\noptions:\n");
    for (int i = 0; i < set->count; i++) {
        char left[80];
        const option_t *option = &set->options[i];
        snprintf(left, sizeof left, "%s%s%s", option->name, option->argument ? " " : "",
                 option->argument ? option->argument : "");
        printf("  %-26s %s\n", left, option->help);
    }
}
