/* A static program is one library, and that one is open; no other can be opened. musl says no to all, and then the
   module ctypes cannot even be imported: it begins with dlopen(NULL). Here that one is answered. No function is found
   by its name, since a static program has no names. */

#include <stddef.h>

static const char *error;

void *dlopen(const char *file, int mode)
{
    (void)mode;
    error = file ? "a static program can open no library" : NULL;
    return file ? NULL : &error;
}

void *dlsym(void *restrict handle, const char *restrict name)
{
    (void)handle, (void)name;
    error = "a static program has no names of functions";
    return NULL;
}

int dlclose(void *handle)
{
    (void)handle;
    return 0;
}

char *dlerror(void)
{
    const char *said = error;
    error = NULL;
    return (char *)said;
}
