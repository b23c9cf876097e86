/*
 * Options of the command's sub-commands, from one table each. A wrong argument is one line on stderr that says what is
 * wrong and what would be right.
 */
#ifndef EPX_TOOL_OPTIONS_H
#define EPX_TOOL_OPTIONS_H

#include <stdbool.h>

typedef enum option_kind {
    OPTION_FLAG,   /* target bool, no value */
    OPTION_NUMBER, /* target long, least .. most */
    OPTION_TEXT,   /* target const char *, not empty */
    OPTION_CHOICE, /* target int: index in `choices`, words separated by commas */
    OPTION_LIST    /* target int[8] and a count after it (option_list_t): several of `choices` */
} option_kind_t;

enum { OPTION_LIST_MAX = 8 };
typedef struct option_list {
    int item[OPTION_LIST_MAX];
    int count;
} option_list_t;

typedef struct option {
    const char *name; /* with its dashes */
    option_kind_t kind;
    void *target;
    long least, most;
    const char *choices;
    const char *argument; /* its name in the help; NULL for flags */
    const char *help;
} option_t;

typedef struct option_set {
    const char *command; /* "bench" */
    const char *about;   /* one line */
    const option_t *options;
    int count;
    const char *positional; /* name of the one optional positional argument, or NULL */
    const char *positional_help;
} option_set_t;

typedef enum options_result { OPTIONS_GO = 0, OPTIONS_HELPED = 1, OPTIONS_WRONG = 2 } options_result_t;

/* argv holds what follows the sub-command. *positional is set when there is one. --help prints the table. */
options_result_t options_parse(const option_set_t *set, int argc, char **argv, const char **positional);

void options_help(const option_set_t *set);

/* "epx COMMAND: words" on stderr; returns 2. */
int options_refuse(const char *command, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
