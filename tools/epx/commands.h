/* The sub-commands. argv holds what follows the name; each returns the exit code: 0, 1 (something is wrong), 2 (wrong
 * arguments). */
#ifndef EPX_TOOL_COMMANDS_H
#define EPX_TOOL_COMMANDS_H

int command_demo(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_info(int argc, char **argv);
int command_check(int argc, char **argv);

#endif
