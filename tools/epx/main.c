/* The `epx` command: finds the sub-command. It uses the public API alone. */
#include "commands.h"
#include "options.h"

#include <stdio.h>
#include <string.h>

#include <epx/epx.h>

static int command_version(int argc, char **argv)
{
    if (argc)
        return options_refuse("version", "\"%s\" is one argument too many: it takes none", argv[0]);
    uint32_t version = epx_version();
    printf("epx %u.%u.%u (command %d.%d.%d)\n", version >> 16, version >> 8 & 255, version & 255, EPX_VERSION_MAJOR,
           EPX_VERSION_MINOR, EPX_VERSION_PATCH);
    return 0;
}

static int command_help(int argc, char **argv);

static const struct command {
    const char *name, *about;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"demo", "a Mixture-of-Experts layer over a text, its experts spread over ranks, checked element by element",
     command_demo},
    {"bench", "verifies and times dispatch, cached dispatch, combine and layout, and those of low latency",
     command_bench},
    {"info", "what this machine offers, what epx would choose and why, and every environment variable", command_info},
    {"check", "sends a pattern between all ranks and says per pair what works", command_check},
    {"version", "the version", command_version},
    {"help", "this; `epx help COMMAND` for the options of one", command_help},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static const struct command *find(const char *name)
{
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}

static int command_help(int argc, char **argv)
{
    char ask[] = "--help", *asked = ask;
    if (argc > 1)
        return options_refuse("help", "\"%s\" is one argument too many: it takes the name of one command", argv[1]);
    if (argc == 1) {
        const struct command *command = find(argv[0]);
        if (!command)
            return options_refuse("help", "\"%s\" is no command; `epx help` lists them", argv[0]);
        if (command->run != command_help && command->run != command_version)
            return command->run(1, &asked);
    }
    printf(
        "epx: expert-parallel exchange of the tokens of Mixture-of-Experts layers\n\nusage: epx COMMAND [options]\n\n");
    for (int i = 0; i < COMMANDS; i++)
        printf("  %-9s %s\n", commands[i].name, commands[i].about);
    printf("\n`epx help COMMAND` lists its options. Exit codes: 0 well, 1 something is wrong, 2 wrong arguments.\n");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return options_refuse("", "a command is needed: demo, bench, info, check, version or help");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return command_help(0, NULL);
    if (strcmp(argv[1], "--version") == 0)
        return command_version(argc - 2, argv + 2);
    const struct command *command = find(argv[1]);
    if (!command)
        return options_refuse("", "\"%s\" is no command: demo, bench, info, check, version or help is needed", argv[1]);
    int code = command->run(argc - 2, argv + 2);
    if (fflush(stdout) || ferror(stdout)) {
        fprintf(stderr, "epx: the output could not be written\n");
        return code ? code : 1;
    }
    return code;
}
