/*
 * Opening the CUDA plug-in: absent, no library at all, without the symbol, of another build, unusable, usable. Each
 * case is a plug-in made by the C compiler beside a copy of this program, which then runs itself with the case's name.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/check.h"
#include "device/plugin.h"

static const char plugin_source[] =
    "#include \"device/plugin.h\"\n"
    "static const epx__plugin_host_t *host;\n"
    "static epx_status_t usable(const char **why)\n"
    "{ *why = USABLE ? \"a GPU of paper\" : \"no GPU of paper\"; return USABLE ? EPX_OK : EPX_E_UNSUPPORTED; }\n"
    "static const epx__device_ops_t device = {.name = \"paper\"};\n"
    "static const epx__plugin_t table = {.abi = ABI, .sizes = EPX__PLUGIN_SIZES, .name = \"paper\",\n"
    "    .device = &device, .exchange_ops = &device, .usable = usable};\n"
    "const epx__plugin_t *SYMBOL(const epx__plugin_host_t *h)\n"
    "{ host = h; return h->process_id() ? &table : 0; }\n";

typedef struct plugin_case {
    const char *name, *flags; /* flags NULL: no compiler */
    epx_status_t status;
    const char *words;
} plugin_case_t;

static const plugin_case_t cases[] = {
    {"garbage", NULL, EPX_E_UNSUPPORTED, "libepx_cuda.so: file too short"},
    {"no_symbol", "-DSYMBOL=other_symbol -DABI=EPX__PLUGIN_ABI -DUSABLE=1", EPX_E_UNSUPPORTED, "no epx__cuda_plugin"},
    {"other_abi", "-DSYMBOL=epx__cuda_plugin -DABI=77 -DUSABLE=1", EPX_E_UNSUPPORTED, "another build"},
    {"unusable", "-DSYMBOL=epx__cuda_plugin -DABI=EPX__PLUGIN_ABI -DUSABLE=0", EPX_E_UNSUPPORTED, "no GPU of paper"},
    {"usable", "-DSYMBOL=epx__cuda_plugin -DABI=EPX__PLUGIN_ABI -DUSABLE=1", EPX_OK, "a GPU of paper"},
};
#define CASES (sizeof cases / sizeof *cases)

/* ---- the copy of this program, beside the plug-in ---- */

static void *ask(void *why)
{
    const epx__plugin_t *plugin = NULL;
    epx_status_t status = epx__plugin_cuda(&plugin, why);
    return status == EPX_OK ? (void *)plugin : NULL;
}

static int run_case(const plugin_case_t *want)
{
    enum { THREADS = 8 };
    pthread_t threads[THREADS];
    const char *why[THREADS] = {NULL}, *again = NULL;
    const epx__plugin_t *plugin = NULL;
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, ask, &why[i]) == 0, "thread");
    epx_status_t status = epx__plugin_cuda(&plugin, &again);
    CHECK(status == want->status, "%s: status %d", want->name, status);
    CHECK(again && strstr(again, want->words), "%s: %s", want->name, again);
    CHECK((plugin != NULL) == (want->status == EPX_OK), "%s: output on success only", want->name);
    CHECK(status == EPX_OK || strstr(epx__detail(), want->words), "%s: %s", want->name, epx__detail());
    for (int i = 0; i < THREADS; i++) {
        void *other;
        pthread_join(threads[i], &other);
        CHECK(other == (const void *)plugin && why[i] == again, "%s: every thread gets the same", want->name);
    }
    if (plugin)
        CHECK(strcmp(plugin->device->name, "paper") == 0, "%s: whose table is it?", want->name);
    return check_done();
}

/* ---- the parent ---- */

static bool copy_self(const char *to)
{
    int in = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    int out = open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0700);
    struct stat file;
    bool fine = in >= 0 && out >= 0 && fstat(in, &file) == 0;
    off_t done = 0;
    while (fine && done < file.st_size)
        fine = sendfile(out, in, &done, (size_t)(file.st_size - done)) > 0;
    close(in);
    close(out);
    return fine;
}

static bool write_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    bool fine = file && fputs(text, file) >= 0;
    return file && fclose(file) == 0 && fine;
}

/* This file is tests/unit/test_plugin.c: the repository's root is two above. */
static bool compile(const char *folder, const char *flags)
{
    char command[4096], root[1024];
    snprintf(root, sizeof root, "%s%s", __FILE__[0] == '/' ? "" : "./", __FILE__);
    for (int i = 0; i < 3; i++) {
        char *slash = strrchr(root, '/');
        if (!slash)
            return false;
        *slash = '\0';
    }
    snprintf(command, sizeof command,
             "cc -std=gnu11 -shared -fPIC -I'%s/include' -I'%s/src' %s -o '%s/libepx_cuda.so' '%s/plugin.c'", root,
             root, flags, folder, folder);
    return system(command) == 0;
}

static void test_case(const plugin_case_t *want, const char *folder, const char *library, const char *program)
{
    bool made = want->flags ? compile(folder, want->flags) : write_file(library, "not a library");
    CHECK(made, "%s: the plug-in could not be made", want->name);
    char command[2048];
    snprintf(command, sizeof command, "'%s' %s", program, want->name);
    fflush(stdout);
    int status = system(command);
    CHECK(status == 0, "%s: %#x", want->name, status);
    unlink(library);
}

int main(int argc, char **argv)
{
    for (size_t i = 0; argc > 1 && i < CASES; i++)
        if (strcmp(argv[1], cases[i].name) == 0)
            return run_case(&cases[i]);
    if (system("cc --version >/dev/null 2>&1") != 0)
        SKIP("no C compiler to make plug-ins with");
    char folder[] = "/tmp/epx-plugin-XXXXXX", library[64], program[64], source[64];
    CHECK(mkdtemp(folder) != NULL, "mkdtemp");
    snprintf(library, sizeof library, "%s/libepx_cuda.so", folder);
    snprintf(program, sizeof program, "%s/program", folder);
    snprintf(source, sizeof source, "%s/plugin.c", folder);
    CHECK(copy_self(program) && write_file(source, plugin_source), "%s cannot be filled", folder);
    for (size_t i = 0; i < CASES; i++)
        test_case(&cases[i], folder, library, program);
    unlink(program);
    unlink(source);
    CHECK(rmdir(folder) == 0, "%s has something else in it", folder);
    return check_done();
}
